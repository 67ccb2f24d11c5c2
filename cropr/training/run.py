"""A training run from spec to record: data, model, initial weights, training, evaluation."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cropr.data.loading import Share, some
from cropr.records import RECORD, provenance, read_record, write_record
from cropr.tasks import TrainSpec, open_task
from cropr.tasks.base import Evaluation, EvaluationSettings, TaskRun, differences
from cropr.training.checkpoint import WEIGHTS, latest_checkpoint, load_initial, save_weights
from cropr.training.distributed import World
from cropr.training.loop import CHECKPOINTS, LOG, Settings, fit, summarise

FINAL_NORMS = ("norm", "fc_norm")
"""timm's two places for the last norm: with average pooling ``fc_norm``, else ``norm``. A host whose pooling differs
from the pretrained one has a fresh norm there, as in the authors' code."""

_LOG = logging.getLogger(__name__)


def train(
    spec: TrainSpec,
    seed: int,
    data_root: Path,
    out: Path,
    *,
    world: World,
    init: Path | None = None,
    workers: int = 0,
    checkpoint_minutes: float = 10,
    evaluate_every: int = 0,
) -> dict[str, Any]:
    """Run ``spec`` and return its record; at once if ``out`` has it already, from its checkpoint if it was cut off.

    Leaves ``record.json``, ``weights.safetensors`` (training form) and ``log.jsonl`` in ``out``.

    Args:
        data_root: the images, in the layout of the task.
        init: weights to start from, a safetensors file or the directory of a run; where ``spec.init`` is a digest.
        workers: processes that decode images, per process that trains.

    Raises:
        ValueError, FileNotFoundError: spec, data, weights or ``out`` that do not fit, by name.
        TrainingDiverged, TrainingInterrupted: see ``fit``.
    """
    started = time.time()
    if (record := finished(out, spec, seed)) is not None:
        return record
    task = open_task(spec, data_root)
    torch.manual_seed(seed)
    model = _initial_model(task, init, resuming=latest_checkpoint(out / CHECKPOINTS) is not None).to(world.device)
    share = Share(rank=world.rank, world=world.size, workers=workers, pin_memory=world.device.type == "cuda")
    evaluate = _evaluation(task, model, seed, world, share)
    identity = {"spec": spec.digest(), "data": task.fingerprint, "init": _fingerprint(init)}
    settings = Settings(
        out=out, identity=identity, checkpoint_minutes=checkpoint_minutes, evaluate_every=evaluate_every
    )
    batches = task.batches(seed, **share)
    history = fit(model, task, batches, spec.recipe, seed, settings, world, lambda: evaluate().metrics)
    result = evaluate()
    record = {
        "kind": "train",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "seed": seed,
        "metrics": {**result.metrics, **parameters(model)},
        "tokens": list(model.token_trace),
        "series": {**result.series, "epochs": history},
        "provenance": {},
    }
    if world.leads:
        record["metrics"] |= summarise(out / LOG)
        where = {"device": str(world.device), "precision": spec.recipe.precision, "data_fingerprint": task.fingerprint}
        record["provenance"] = provenance(started, **where, processes=world.size, workers=workers)
        save_weights(out / WEIGHTS, model, spec.digest())
        write_record(out / RECORD, record)
        shutil.rmtree(out / CHECKPOINTS)
    world.wait()
    return record


def _evaluation(task: TaskRun, model: Any, seed: int, world: World, share: Share) -> Callable[[], Evaluation]:
    """The evaluation of a model as it is when this is called, on the images of this process."""
    recipe = task.spec.recipe
    settings = EvaluationSettings(
        batch_size=max(1, recipe.batch_size // (recipe.accumulate * world.size)),
        device=world.device,
        precision=recipe.precision,
        seed=seed,
        total=world.sum,
        gather=world.gather,
    )
    return lambda: task.evaluate(model, settings, **share)


def finished(out: Path, spec: TrainSpec, seed: int) -> dict[str, Any] | None:
    """The record in ``out`` if the run is complete, its weights included; None if it has yet to run.

    Raises:
        ValueError: ``out`` holds another run; the settings that differ are named.
    """
    if not (out / RECORD).exists() or not (out / WEIGHTS).exists():
        return None
    record = read_record(out)
    mine = {"seed": seed, "spec": spec.model_dump(mode="json")}
    theirs = {"seed": record.get("seed"), "spec": record.get("spec")}
    if mine != theirs:
        changes = some(differences(theirs, mine), limit=5)
        raise ValueError(f"{out} holds the record of another run: {changes}. Choose another --out, or delete it")
    return record


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters in training form, and how many of them only training needs (the deployed form has one vector a
    reducer instead, no parameters)."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    extra = sum(size for name, size in sizes.items() if name.startswith("reducers."))
    return {"parameters": sum(sizes.values()), "parameters_training_only": extra}


def _initial_model(task: TaskRun, init: Path | None, resuming: bool) -> Any:
    """The model with the weights to start from; a run that is resumed needs none."""
    spec = task.spec
    known = spec.init in ("random", "timm")
    if known and init is not None:
        raise ValueError(f"spec.init = {spec.init}: takes no weights, but {init} was given; leave one of them out")
    pretrained = spec.init == "timm" and not resuming
    try:
        model = task.build(pretrained)
    except (RuntimeError, OSError, TypeError) as error:
        # timm: unknown model or argument, weights that do not exist or cannot be fetched; ours: no adapter.
        fix = "; without a network, give a file with --init" if pretrained else ""
        raise ValueError(f"spec.model.name = {spec.model.name}: {error}{fix}") from error
    if known or resuming:
        return model
    if init is None:
        raise ValueError(f"spec.init = {spec.init}: name that run's weights with --init (file or directory of the run)")
    path = _weights_file(init)
    if (path.parent / RECORD).exists() and (found := read_record(path.parent)["id"]) != spec.init:
        raise ValueError(f"{path} was made by run {found}, spec.init asks for {spec.init}")
    if not task.load_published(model, path):
        load_initial(model, path, fresh=FINAL_NORMS)
    return model


def _weights_file(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path


def _fingerprint(init: Path | None) -> str | None:
    """Digest of the initial weights: a checkpoint is not resumed with others."""
    if init is None:
        return None
    with _weights_file(init).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
