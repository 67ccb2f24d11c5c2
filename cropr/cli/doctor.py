"""Print what a bug report needs: versions, device, threads, memory and data roots.

examples:
  python -m cropr doctor
  python -m cropr doctor --json > doctor.json

Nothing is changed, and nothing is sent. Of your paths only the data roots that config/config.yaml names are shown.
It works without torch, and then says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cropr import __version__
from cropr.records import cpu_model, provenance
from workflow.paper.configuration import read_settings, read_yaml

PACKAGES = ("torch", "torchvision", "timm", "numpy", "snakemake", "papermill")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

Report = dict[str, dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument(
        "--config", type=Path, default=Path("config/config.yaml"), help="file that names the data roots"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that the workflow writes to")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> None:
    """Collect and print; always succeeds, what is wrong stands under ``problems``."""
    report = collect(args.config, args.results)
    problems = list(find_problems(report))
    if args.json:
        sys.stdout.write(json.dumps({**report, "problems": problems}, indent=2) + "\n")
        return
    table = Table.grid(padding=(0, 2))
    for title, entries in report.items():
        table.add_row(f"[bold]{title}[/bold]")
        for name, value in entries.items():
            table.add_row("  " + name.replace("_", " ") if name.islower() else f"  {name}", Text(_text(value)))
    console = Console()
    console.print(table)
    console.print("[bold]problems[/bold]")
    for problem in problems or ["none found"]:
        console.print(f"  {problem}", markup=False, highlight=False)


def collect(config: Path, results: Path) -> Report:
    """All that is known about this machine and this installation, as sections of plain JSON values.

    Args:
        config: the workflow's configuration; may be missing.
        results: the workflow's output folder; may be missing, it is not made.
    """
    try:
        import torch
    except (ImportError, OSError) as error:  # absent, or one of its libraries does not load
        torch_state: Report = {"torch": {"usable": False, "reason": str(error)}}
    else:
        torch_state = {"torch": {"usable": True, **_torch_settings(torch)}, "devices": _devices(torch)}
    return {"software": _software(), **torch_state, "machine": _machine(), "folders": _folders(config, results)}


def find_problems(report: Report) -> Iterator[str]:
    """What would stop a run or make its numbers wrong, each as a sentence with the fix."""
    if not report["torch"]["usable"]:
        yield f"torch cannot be imported ({report['torch']['reason']}); make env installs it"
    elif report["torch"]["threads"] > report["machine"]["cores_usable"]:
        usable = report["machine"]["cores_usable"]
        threads = report["torch"]["threads"]
        yield f"torch uses {threads} threads on {usable} usable cores, which is slow; set OMP_NUM_THREADS={usable}"
    folders = report["folders"]
    for name, root in folders["data_roots"].items():
        if not root["readable"]:
            yield f"data root {name}: {root['path']} is no folder that can be read; correct it in {folders['config']}"
    if "config_error" in folders:
        yield f"no data roots: {folders['config_error']}; doctor is at home in the root of the repository"
    if not folders["results_writable"]:
        yield f"{folders['results']} cannot be written to; the workflow needs it"
    if folders["disk_free_gb"] < 2:
        yield f"{folders['disk_free_gb']} GB of disk are free; the laptop scale needs about 2"


def _software() -> dict[str, Any]:
    here = provenance(time.time())
    versions: dict[str, Any] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "cropr": __version__,
        "commit": here["commit"],
        "uncommitted_changes": here["dirty"],
        "python": platform.python_version(),
        **versions,
        "virtual_environment": sys.prefix != sys.base_prefix,
        "conda_environment_active": "CONDA_PREFIX" in os.environ,
        "conda_on_path": shutil.which("conda") is not None,
    }


def _torch_settings(torch: ModuleType) -> dict[str, Any]:
    """Threads and kernels; the attention backends count for CUDA, a CPU has its own fused kernel."""
    attention = torch.backends.cuda
    enabled = {
        "flash": attention.flash_sdp_enabled(),
        "memory_efficient": attention.mem_efficient_sdp_enabled(),
        "cudnn": attention.cudnn_sdp_enabled(),
        "math": attention.math_sdp_enabled(),
    }
    return {
        "threads": torch.get_num_threads(),
        "threads_between_operations": torch.get_num_interop_threads(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "cuda_build": torch.version.cuda,
        "attention_backends": [name for name, on in enabled.items() if on],
        "float32_matmul": torch.get_float32_matmul_precision(),
    }


def _devices(torch: ModuleType) -> dict[str, Any]:
    """Accelerators that torch can use, with memory in 10^9 bytes."""
    devices: dict[str, Any] = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = {
            "name": device.name,
            "memory_gb": round(device.total_memory / 1e9, 1),
            "capability": f"{device.major}.{device.minor}",
            "bf16": device.major >= 8,
        }
    if torch.backends.mps.is_available():
        devices["mps"] = {"name": "Apple GPU"}
    return {"accelerators": devices or "none: everything runs on the CPU"}


def _machine() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_flags": _cpu_flags(),
        "cores": os.cpu_count(),
        "cores_usable": usable,
        "memory_gb": _memory_gb("SC_PHYS_PAGES"),
        "memory_free_gb": _memory_gb("SC_AVPHYS_PAGES"),
        **{name: os.environ.get(name) for name in THREAD_VARIABLES},
    }


def _cpu_flags() -> list[str] | None:
    """Those of ``CPU_FLAGS`` that the processor has (bf16 is slow on a CPU without the last two); None if unknown."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    return None if flags is None else [flag for flag in CPU_FLAGS if flag in flags]


def _memory_gb(pages: str) -> float | None:
    """Physical memory in 10^9 bytes; None where the system does not tell."""
    try:
        return round(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _folders(config: Path, results: Path) -> dict[str, Any]:
    """Data roots and the results folder; looks, writes nothing."""
    existing = next(folder for folder in (results.absolute(), *results.absolute().parents) if folder.exists())
    folders: dict[str, Any] = {
        "config": str(config),
        "data_roots": {},
        "results": str(results),
        "results_writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "disk_free_gb": round(shutil.disk_usage(existing).free / 1e9, 1),
    }
    try:
        roots = read_settings(read_yaml(config), str(config)).roots
    except (FileNotFoundError, ValueError) as error:
        folders["config_error"] = str(error)
    else:
        folders["data_roots"] = {
            name: {"path": str(root), "readable": root.is_dir() and os.access(root, os.R_OK | os.X_OK)}
            for name, root in roots.items()
            if root is not None
        }
    return folders


def _text(value: Any) -> str:
    """A value as a reader wants it in a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_text(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "-" if value is None else str(value)
