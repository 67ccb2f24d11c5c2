"""Which source files a result depends on, and their digest: a rule reruns when its own files change, no other does.

Snakemake does not see what a command imports, so rules put ``code_digest(...)`` in their ``params``. A test walks the
imports of every verb and holds the lists below to them.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from cropr.specs import PruneSpec, Task

PACKAGE = Path(__file__).parent

NEUTRAL = frozenset(
    {
        "__init__.py",
        "cli.py",
        "specs.py",
        "records.py",
        "configuration.py",
        "experiments.py",
        "sources.py",
        "commands/spec_flags.py",
        "commands/pruning_flags.py",
        "lab_specs.py",
        "data/check.py",  # of `data check`, which the workflow does not call
    }
)
"""Imported by every job, but what they decide reaches it as text: its specification and its command line."""

_MODEL = ("runtime.py", "schedule.py", "tokens.py", "fusion.py", "model.py", "backbones/*.py")
_REDUCERS = ("reducers/__init__.py", "reducers/base.py")

_RUN = (*_MODEL, "tasks/__init__.py", "tasks/base.py", "training/*.py", "data/__init__.py", "data/loading.py")

_CLOCK = (
    *_MODEL,
    *(f"bench/{name}.py" for name in ("__init__", "attention", "contest", "device", "flops", "memory", "models")),
    "bench/peak.py",
    "bench/timing.py",
    "bench/throughput.py",
    "tasks/detection/encoder.py",
    "commands/bench.py",
)
_LAB = (*_CLOCK, "bench/lab.py", "commands/lab.py")

SOURCES: dict[str, tuple[str, ...]] = {
    "data": ("data/__init__.py", "data/scenes.py", "data/layouts.py", "commands/data.py"),
    "train": (*_RUN, "commands/train.py"),
    "bench": _CLOCK,
    "bench_detector": (
        *_CLOCK,
        "bench/heads.py",
        "bench/detection_flops.py",
        *(f"tasks/detection/{name}.py" for name in ("cascade", "neck", "nms", "proposals", "regions")),
    ),
    "maps": (*_RUN, "tasks/views/*.py", "commands/show.py"),
    "sweep": (*_LAB, "bench/sweep.py"),
    "blocks": (*_LAB, "bench/alignment.py", "bench/blocks.py"),
    "profile": (*_LAB, "bench/profiling.py"),
    "scoring": (*_LAB, "bench/scoring.py"),
    "training": (
        *_LAB,
        *_RUN,
        "bench/training_step.py",
        "tasks/classification.py",
        "data/imagenet.py",
        "data/scenes.py",
    ),
    "plan": (
        *_CLOCK,
        *(f"bench/{name}.py" for name in ("costs", "planner", "roofline", "sweep", "timeline")),
        "commands/plan.py",
    ),
    "notebook": ("report/*.py", "!report/page.py", "schedule.py", "data/scenes.py", "../workflow/run_notebook.py"),
    "report": ("report/*.py", "schedule.py", "data/scenes.py"),
}
"""Files of each kind of job, relative to the package; a leading ``!`` takes a file out again."""

BY_TASK: dict[Task, tuple[str, ...]] = {
    "classification": ("tasks/classification.py", "data/imagenet.py", "data/scenes.py"),
    "segmentation": ("tasks/segmentation*.py", "data/ade20k.py", "data/scenes.py"),
    "detection": ("tasks/detection/*.py", "data/annotations.py", "data/coco.py", "data/jitter.py", "data/scenes.py"),
}
"""What a task adds to jobs that train or show a model."""

BY_REDUCER: dict[str, tuple[str, ...]] = {
    "none": (),
    "cropr": (*_REDUCERS, "reducers/select.py", "scorer.py"),
    "non_salient": (*_REDUCERS, "reducers/select.py", "scorer.py"),
    "random": (*_REDUCERS, "reducers/select.py"),
    "variance": (*_REDUCERS, "reducers/select.py"),
    "attn_topk": (*_REDUCERS, "reducers/select.py"),
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
        files = set(PACKAGE.glob(pattern.removeprefix("!")))
        if pattern.startswith("../"):
            files = {PACKAGE.parent / pattern.removeprefix("../")}
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(f"{PACKAGE / pattern}: no such source file; correct cropr/sources.py")
        chosen = chosen - files if pattern.startswith("!") else chosen | files
    return sorted(chosen)


@cache
def _digest(patterns: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for file in source_files(patterns):
        digest.update(f"{file.relative_to(PACKAGE.parent).as_posix()}\0".encode())
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:10]
