"""Which source files a result depends on, and their digest: a rule reruns when its own files change, no other does.

Snakemake does not see what a command imports, so rules put ``code_digest(...)`` in their ``params``. A test walks the
imports of every verb and holds the lists below to them.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from cropr.specs import PruneSpec, Task

ROOT = Path(__file__).parents[2]

NEUTRAL = frozenset(
    {
        "cropr/__init__.py",
        "cropr/cli/__init__.py",
        "cropr/specs.py",
        "cropr/records.py",
        "workflow/paper/configuration.py",
        "workflow/paper/grid.py",
        "workflow/paper/sources.py",
        "cropr/cli/spec_flags.py",
        "cropr/cli/pruning_flags.py",
        "cropr/bench/specs.py",
        "cropr/data/check.py",  # of `data check`, which the workflow does not call
    }
)
"""Imported by every job, but what they decide reaches it as text: its specification and its command line."""

_MODEL = (
    "cropr/runtime.py",
    "cropr/pruning/schedule.py",
    "cropr/pruning/tokens.py",
    "cropr/pruning/fusion.py",
    "cropr/pruning/model.py",
    "cropr/pruning/backbones/*.py",
)
_REDUCERS = ("cropr/pruning/reducers/__init__.py", "cropr/pruning/reducers/base.py")

_RUN = (
    *_MODEL,
    "cropr/tasks/__init__.py",
    "cropr/tasks/base.py",
    "cropr/training/*.py",
    "cropr/data/__init__.py",
    "cropr/data/loading.py",
)

_CLOCK = (
    *_MODEL,
    *(f"cropr/bench/{name}.py" for name in ("__init__", "attention", "contest", "device", "flops", "memory", "models")),
    "cropr/bench/peak.py",
    "cropr/bench/timing.py",
    "cropr/bench/throughput.py",
    "cropr/tasks/detection/encoder.py",
    "cropr/cli/bench.py",
)
_LAB = (*_CLOCK, "cropr/bench/lab.py", "cropr/cli/lab.py")

SOURCES: dict[str, tuple[str, ...]] = {
    "data": ("cropr/data/__init__.py", "cropr/data/scenes.py", "cropr/data/layouts.py", "cropr/cli/data.py"),
    "train": (*_RUN, "cropr/cli/train.py"),
    "bench": _CLOCK,
    "bench_detector": (
        *_CLOCK,
        "cropr/bench/heads.py",
        "cropr/bench/detection_flops.py",
        *(f"cropr/tasks/detection/{name}.py" for name in ("cascade", "neck", "nms", "proposals", "regions")),
    ),
    "maps": (*_RUN, "cropr/tasks/views/*.py", "cropr/cli/show.py"),
    "sweep": (*_LAB, "cropr/bench/sweep.py"),
    "blocks": (*_LAB, "cropr/bench/alignment.py", "cropr/bench/blocks.py"),
    "profile": (*_LAB, "cropr/bench/profiling.py"),
    "scoring": (*_LAB, "cropr/bench/scoring.py"),
    "training": (
        *_LAB,
        *_RUN,
        "cropr/bench/training_step.py",
        "cropr/tasks/classification/*.py",
        "cropr/data/imagenet.py",
        "cropr/data/scenes.py",
    ),
    "plan": (
        *_CLOCK,
        *(f"cropr/bench/{name}.py" for name in ("costs", "planner", "roofline", "sweep", "timeline")),
        "cropr/cli/plan.py",
    ),
    "notebook": ("workflow/paper/*.py", "!workflow/paper/page.py", "cropr/pruning/schedule.py", "cropr/data/scenes.py"),
    "report": ("workflow/paper/*.py", "cropr/pruning/schedule.py", "cropr/data/scenes.py"),
}
"""Files of each kind of job, relative to the repository; a leading ``!`` takes a file out again."""

BY_TASK: dict[Task, tuple[str, ...]] = {
    "classification": ("cropr/tasks/classification/*.py", "cropr/data/imagenet.py", "cropr/data/scenes.py"),
    "segmentation": ("cropr/tasks/segmentation/*.py", "cropr/data/ade20k.py", "cropr/data/scenes.py"),
    "detection": (
        "cropr/tasks/detection/*.py",
        "cropr/data/annotations.py",
        "cropr/data/coco.py",
        "cropr/data/jitter.py",
        "cropr/data/scenes.py",
    ),
}
"""What a task adds to jobs that train or show a model."""

BY_REDUCER: dict[str, tuple[str, ...]] = {
    "none": (),
    "cropr": (*_REDUCERS, "cropr/pruning/reducers/select.py", "cropr/pruning/scorer.py"),
    "non_salient": (*_REDUCERS, "cropr/pruning/reducers/select.py", "cropr/pruning/scorer.py"),
    "random": (*_REDUCERS, "cropr/pruning/reducers/select.py"),
    "variance": (*_REDUCERS, "cropr/pruning/reducers/select.py"),
    "attn_topk": (*_REDUCERS, "cropr/pruning/reducers/select.py"),
}
"""What a reducer adds to jobs that build a model with it."""


def code_digest(kind: str, prune: PruneSpec | None = None, task: Task | None = None) -> str:
    """Ten hex digits of the contents of the files behind a job.

    Args:
        kind: key of ``SOURCES``.
        prune: what the job's model prunes with; its reducer's files count, other reducers' do not.
        task: whose files count, if any.

    Raises:
        FileNotFoundError: a pattern that no file matches.
    """
    return _digest((*SOURCES[kind], *(BY_REDUCER[prune.reducer] if prune else ()), *(BY_TASK[task] if task else ())))


def source_files(patterns: tuple[str, ...]) -> list[Path]:
    """Files that the patterns name, sorted.

    Raises:
        FileNotFoundError: a pattern that no file matches.
    """
    chosen: set[Path] = set()
    for pattern in patterns:
        files = set(ROOT.glob(pattern.removeprefix("!")))
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(f"{ROOT / pattern}: no such source file; correct workflow/paper/sources.py")
        chosen = chosen - files if pattern.startswith("!") else chosen | files
    return sorted(chosen)


@cache
def _digest(patterns: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for file in source_files(patterns):
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:10]
