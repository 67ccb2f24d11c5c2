"""What a job leaves behind: one ``record.json`` with its spec, numbers and provenance.

A record that exists is complete: it is written under a temporary name and renamed. No torch is imported here.
"""

import csv
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    folders made here that hold no content are removed. Raises ValueError: another process, by name, runs there."""
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


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = ()) -> None:
    """Write rows as CSV, whole or not at all; ``columns`` are those of a table without rows."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0] if rows else columns))
        table.writeheader()
        table.writerows(rows)


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write ``record`` as JSON with sorted keys, whole or not at all. Raises ValueError: a number is NaN or infinite;
    the message names its key; TypeError: a value is not JSON (a tensor, a path)."""
    values = leaves(record, "record", lists=True)
    if bad := [key for key, value in values if isinstance(value, float) and not math.isfinite(value)]:
        raise ValueError(f"{path}: {', '.join(bad)} is not finite; if training diverged, lower the learning rate")
    write_text(path, json.dumps(record, sort_keys=True, indent=1, allow_nan=False) + "\n")


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record; ``path`` is the file or the job's directory. FileNotFoundError, ValueError: no record."""
    path = Path(path)
    path = path / RECORD if path.is_dir() else path
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no record; the job has not run to its end") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a record, {error}; delete it and run the job again") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a record, its top level is a {type(record).__name__}")
    return record


def make_record(kind: str, spec: "Spec", started: float, found: dict[str, Any], **origin: Any) -> dict[str, Any]:
    """The record of a job: kind, id, spec and provenance (``started`` and ``origin``) around what it found."""
    told = provenance(started, **{"precision": getattr(spec, "precision", None), **origin})
    return {"kind": kind, "id": spec.digest(), "spec": spec.model_dump(mode="json"), **found, "provenance": told}


def provenance(started: float, *, device: str = "cpu", **more: Any) -> dict[str, Any]:
    """Where the numbers of a record come from: ``started`` is ``time.time()`` when the job began, ``device`` torch's
    name. An entry of ``more`` replaces the one of its name: ``precision`` is None where the job computes no network."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1
    return {
        **code_origin(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if torch and device.startswith("cuda") else "cpu",
        "cpu": cpu_model(),
        "threads": int(threads),
        "precision": None,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "wall_s": round(time.time() - started, 2),
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        "data_fingerprint": None,
        **more,
    }


def package_versions(*more: str) -> dict[str, str]:
    """Installed versions of ``PACKAGES`` and ``more``, read without importing them."""
    versions = {}
    for name in (*PACKAGES, *more):
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


@cache
def code_origin() -> dict[str, Any]:
    """Commit of the checkout that this package runs from, whether it has changes, both None when it is installed; and
    the SHA-256 of its ``requirements.lock``, None if there is none. It is read once: files may change in a long job."""
    lock = Path(__file__).parents[1] / "requirements.lock"
    found = {"lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None}
    # A virtual environment often lies inside some other repository; only one that tracks this file counts.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None or not (commit := _git("rev-parse", "HEAD")):
        return {"commit": None, "dirty": None, **found}
    changes = _git("status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes), **found}


def _git(*arguments: str) -> str | None:
    """Output of a git command in this package's directory, None if it fails or there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def leaves(value: Any, key: str = "", lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings, and of ``lists`` within if asked for; an empty mapping is a value."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}".lstrip("."), lists)
    elif lists and isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from leaves(item, f"{key}[{place}]", lists)
    else:
        yield key, value
