"""Print what a bug report needs: versions, device, threads, data roots, and the problems found.

examples:
  python -m cropr doctor
  python -m cropr doctor --json > doctor.json
  python -m cropr doctor --data /data/imagenet --workers 8   # and the images/s of the loader alone

Nothing is changed, and nothing is sent. Of your paths, only the data roots in config/config.yaml and the results folder
are shown. Without torch it prints the rest and says so.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from cropr import __version__
from cropr.cli.spec_flags import LAYOUTS, say
from cropr.records import provenance
from cropr.specs import load_yaml

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
_LONG = ("cpu_info", "pip_packages", "conda_packages", "pip_version")
Report = dict[str, dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default="config/config.yaml", help="file that names the data roots")
    parser.add_argument("--results", type=Path, default="results", help="folder that the workflow writes to")
    parser.add_argument("--data", type=Path, metavar="DIR", help="also measure how fast training images are decoded")
    parser.add_argument("--layout", choices=LAYOUTS, default="imagenet", help="of --data (default imagenet)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> None:
    """Collect and print; always succeeds, what is wrong stands under ``problems``."""
    report = collect(args.config, args.results)
    if args.data:
        report["loader"] = measure_loader(args.data, args.layout, args.workers)
    problems = list(find_problems(report))
    if args.json:
        sys.stdout.write(json.dumps({**report, "problems": problems}, indent=2) + "\n")
        return
    for title, entries in report.items():
        say(title)
        for name, value in entries.items():
            say(f"  {name}: {json.dumps(value) if isinstance(value, dict | list | bool) else value}")
    say("\n  ".join(["problems", *(problems or ["none found"])]))


def collect(config: Path, results: Path) -> Report:
    """Facts about this computer and this installation, as JSON values; ``config`` and ``results`` may be missing."""
    here = provenance(time.time())
    software = {"cropr": __version__, "python": here["python"], **here["packages"]}
    software |= {name: version(name) for name in ("snakemake", "papermill") if find_spec(name)}
    software |= {"commit": here["commit"], "uncommitted_changes": here["dirty"]}
    software["conda_environment_active"] = "CONDA_PREFIX" in os.environ
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {"platform": here["platform"], "cpu": here["cpu"], "cores": os.cpu_count(), "cores_usable": usable}
    machine |= {name: os.environ.get(name) for name in VARIABLES}
    return {"software": software, "torch": _torch(), "machine": machine, "folders": _folders(config, results)}


def find_problems(report: Report) -> Iterator[str]:
    """What would stop a run or make its numbers wrong, each as a sentence with the fix."""
    torch, folders, usable = report["torch"], report["folders"], report["machine"]["cores_usable"]
    if "reason" in torch:
        yield f"torch cannot be imported ({torch['reason']}); make env installs it"
    elif (threads := torch["threads"]) > usable:
        yield f"torch uses {threads} threads on {usable} usable cores, which is slow; set OMP_NUM_THREADS={usable}"
    if folders["config_error"]:
        yield f"no data roots: {folders['config_error']}; run doctor in the root of the repository"
    for name, root in folders["data_roots"].items():
        if not root["readable"]:
            yield f"data root {name}: {root['path']} is not a readable folder; correct it in {folders['config']}"
    if not folders["results_writable"]:
        yield f"{folders['results']} cannot be written to; the workflow needs it"
    if folders["disk_free_gb"] < 2:
        yield f"{folders['disk_free_gb']} GB of disk are free; the laptop scale needs about 2"


def measure_loader(root: Path, layout: str, workers: int, seconds: float = 5) -> dict[str, Any]:
    """Training images a second that the loader alone makes, augmented as in the paper's recipe."""
    from cropr.tasks import TASKS, TrainSpec, open_task

    task, data = next(task for task in TASKS.values() if task.layout == layout), dict[str, Any]()
    if layout == "imagenet" and (root / "train").is_dir():
        classes = sum(folder.is_dir() for folder in (root / "train").iterdir())
        data = {"num_classes": classes, "augment": {"auto_augment": "rand-m9-mstd0.5-inc1"}}
    spec = TrainSpec(task=task.name, model={"name": "vit_large_patch16_224"}, data=data, recipe={"batch_size": 8})
    batches = open_task(spec, root).batches(0, workers=workers)
    endless = (pixels for epoch in count() for pixels, _ in batches.epoch(epoch))
    next(endless)  # the workers are running now
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        images += len(next(endless))
    rate = images / (time.perf_counter() - started)
    return {"folder": str(root), "workers": workers, "images_per_s": round(rate, 1)}


def _torch() -> dict[str, Any]:
    """Threads, libraries and devices as torch sees them."""
    try:
        import torch
        from torch.utils.collect_env import get_env_info
    except (ImportError, OSError) as error:  # absent, or one of its libraries does not load
        return {"usable": False, "reason": str(error)}
    settings = {"threads": torch.get_num_threads(), "cpu_kernels": torch.backends.cpu.get_cpu_capability()}
    return {"usable": True, **settings, **{k: v for k, v in get_env_info()._asdict().items() if k not in _LONG}}


def _folders(config: Path, results: Path) -> dict[str, Any]:
    existing = next(folder for folder in (results.absolute(), *results.absolute().parents) if folder.exists())
    try:
        values, problem = load_yaml(config.read_text(encoding="utf-8"), str(config)), None
    except (OSError, ValueError) as error:
        values, problem = {}, f"{config}: {error}"
    reads = os.R_OK | os.X_OK
    roots = {name: values[name] for name in ("folder", *LAYOUTS) if values.get(name)}
    return {
        "config": str(config),
        "config_error": problem,
        "data_roots": {name: {"path": root, "readable": os.access(f"{root}/.", reads)} for name, root in roots.items()},
        "results": str(results),
        "results_writable": os.access(f"{existing}/.", os.W_OK | os.X_OK),
        "disk_free_gb": round(shutil.disk_usage(existing).free / 1e9, 1),
    }
