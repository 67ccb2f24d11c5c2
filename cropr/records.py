"""What a job leaves behind: one ``record.json`` with its spec, numbers and provenance.

A record that exists is complete: it is written under a temporary name and renamed. No torch is imported here.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from cropr.specs import Spec

RECORD = "record.json"
"""Name of the file in the job's directory."""
LOCK = ".lock"
"""Name of the file that says which process runs in a directory."""

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "pydantic", "scikit-learn")
"""Packages whose version can change a number; those that are not installed are left out of the record."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the directory of ``path``; the file under it becomes ``path``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.umask(umask := os.umask(0))
        temporary.chmod(0o666 & ~umask)  # some libraries make files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder for one process alone, without the temporary files of one that was killed. If the body fails,
    folders made here that hold no content are removed.

    Raises:
        ValueError: another process runs there; the message names it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / LOCK).open("a+", encoding="utf-8") as file:
            if not _lock(file):
                file.seek(0)
                raise ValueError(f"{folder}: {file.read()} runs in this folder; wait for it or choose another --out")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}, since {datetime.now().isoformat(' ', 'seconds')},")
            file.flush()
            for left in folder.glob(".*.*.tmp"):  # as ``replacing`` names them
                left.unlink()
            try:
                yield
            finally:
                (folder / LOCK).unlink(missing_ok=True)
    except BaseException:
        with suppress(OSError):  # not empty
            for empty in [entry for entry in folder.iterdir() if made and not entry.stat().st_size]:
                empty.unlink()
            for place in made:
                place.rmdir()
        raise


def _lock(file: TextIO) -> bool:
    """Whether an open file could be locked; True also where there are no locks (Windows, some file systems)."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        return not isinstance(error, BlockingIOError)
    return True


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write ``record`` as JSON with sorted keys, whole or not at all. Raises ValueError: a number is NaN or infinite;
    the message names its key; TypeError: a value is not JSON (a tensor, a path)."""
    if bad := [key for key, number in _numbers(record, "record") if not math.isfinite(number)]:
        raise ValueError(f"{path}: {', '.join(bad)} is not a finite number; a record holds results, not failures")
    write_text(path, json.dumps(record, sort_keys=True, indent=1, allow_nan=False) + "\n")


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record; ``path`` is the file or the job's directory. FileNotFoundError, ValueError: no record."""
    path = Path(path)
    path = path / RECORD if path.is_dir() else path
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no record; the job has not run to its end") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a record, {error}; delete it and run the job again") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a record, its top level is a {type(record).__name__}")
    return record


def make_record(kind: str, spec: Spec, started: float, found: dict[str, Any], **origin: Any) -> dict[str, Any]:
    """The record of a job: kind, id, spec and provenance (``started`` and ``origin``) around what it found."""
    told = provenance(started, **{"precision": getattr(spec, "precision", None), **origin})
    return {"kind": kind, "id": spec.digest(), "spec": spec.model_dump(mode="json"), **found, "provenance": told}


def provenance(
    started: float,
    *,
    device: str = "cpu",
    precision: str | None = None,
    data_fingerprint: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Where the numbers of a record come from.

    ``started`` is ``time.time()`` at the start of the job, ``device`` torch's name, ``precision`` None where the job
    computes no network. An entry of ``more`` with a name from above replaces it. Megabytes are 10^6 bytes: the peak of
    the allocator on CUDA, else of this process's resident size. Outside a checkout, commit and dirty are None.
    """
    commit, dirty = _checkout()
    return {
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "device": sys.modules["torch"].cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "cpu": cpu_model(),
        "threads": _threads(),
        "precision": precision,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "wall_s": round(time.time() - started, 2),
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        "data_fingerprint": data_fingerprint,
        **more,
    }


def package_versions() -> dict[str, str]:
    """Installed versions of ``PACKAGES``, read without importing them."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


@cache
def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def peak_memory_mb(device: str = "cpu") -> float:
    """Peak memory so far in 10^6 bytes: of torch's allocator on CUDA, else of this process (0 where unknown)."""
    if device.startswith("cuda"):
        return float(sys.modules["torch"].cuda.max_memory_allocated(device) / 1e6)
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes on macOS, KiB on Linux


def _threads() -> int:
    """Threads of one operation: torch's setting if the job loaded torch, else what the environment asks for."""
    if torch := sys.modules.get("torch"):
        return int(torch.get_num_threads())
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


@cache
def _checkout() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this package runs from, and whether it has changes; None when it is installed."""
    # A virtual environment often lies inside some other repository; only one that tracks this file counts.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None or not (commit := _git("rev-parse", "HEAD")):
        return None, None
    changes = _git("status", "--porcelain")
    return commit, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    """Output of a git command in this package's directory, None if it fails or there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """All floats below ``value`` with their dotted key."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict | list | tuple):
        items, form = (value.items(), "{}.{}") if isinstance(value, dict) else (enumerate(value), "{}[{}]")
        for name, item in items:
            yield from _numbers(item, form.format(key, name))
