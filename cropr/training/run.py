"""A training run from spec to record: data, model, initial weights, training, evaluation."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cropr.data.imagenet import EvalBatches, Split, TrainBatches, load_splits
from cropr.model import PrunedViT, build_model
from cropr.records import RECORD, provenance, read_record, write_record
from cropr.specs import DataSpec, TrainSpec
from cropr.tasks.classification import Classification, Evaluation, evaluate, object_map
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
        data_root: holds ``train/<class>/*`` and ``val/<class>/*``.
        init: weights to start from, a safetensors file or the directory of a run; where ``spec.init`` is a digest.
        workers: processes that decode images, per process that trains.

    Raises:
        ValueError, FileNotFoundError: spec, data, weights or ``out`` that do not fit, by name.
        TrainingDiverged, TrainingInterrupted: see ``fit``.
    """
    started = time.time()
    if (record := finished(out, spec, seed)) is not None:
        return record
    splits = load_splits(data_root, spec.data.num_classes)
    fingerprint = verify_data(data_root, splits, spec.data)
    torch.manual_seed(seed)
    model = _initial_model(spec, init, resuming=latest_checkpoint(out / CHECKPOINTS) is not None).to(world.device)
    pin = world.device.type == "cuda"
    batches = TrainBatches(
        splits[0],
        spec.data,
        spec.recipe.batch_size,
        seed,
        rank=world.rank,
        world=world.size,
        workers=workers,
        pin_memory=pin,
    )
    validation = _Validation(model, splits[1], spec, seed, world, workers)
    history = fit(
        model,
        Classification(spec.data, spec.prune.aux_weight),
        batches,
        spec.recipe,
        seed,
        Settings(
            out=out,
            identity={"spec": spec.digest(), "data": fingerprint, "init": _fingerprint(init)},
            checkpoint_minutes=checkpoint_minutes,
            evaluate_every=evaluate_every,
        ),
        world,
        lambda: validation().metrics,
    )
    result = validation()
    record = {
        "kind": "train",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "seed": seed,
        "metrics": {**result.metrics, **parameters(model)},
        "tokens": list(model.token_trace),
        "series": {"relevance": result.relevance, "epochs": history},
        "provenance": {},
    }
    if world.leads:
        record["metrics"] |= summarise(out / LOG)
        record["provenance"] = provenance(
            started,
            device=str(world.device),
            precision=spec.recipe.precision,
            data_fingerprint=fingerprint,
            processes=world.size,
            workers=workers,
        )
        save_weights(out / WEIGHTS, model, spec.digest())
        write_record(out / RECORD, record)
        shutil.rmtree(out / CHECKPOINTS)
    world.wait()
    return record


def finished(out: Path, spec: TrainSpec, seed: int) -> dict[str, Any] | None:
    """The record in ``out`` if the run is complete, None if it has yet to run.

    Raises:
        ValueError: ``out`` holds another run; the settings that differ are named.
    """
    if not (out / RECORD).exists():
        return None
    record = read_record(out)
    mine = {"seed": seed, "spec": spec.model_dump(mode="json")}
    theirs = {"seed": record.get("seed"), "spec": record.get("spec")}
    if mine != theirs:
        ours, its = dict(_leaves(mine)), dict(_leaves(theirs))
        differing = sorted(key for key in {*ours, *its} if ours.get(key) != its.get(key))
        changes = "; ".join(f"{key} was {its.get(key)}, is {ours.get(key)}" for key in differing)
        raise ValueError(f"{out} holds the record of another run: {changes}. Choose another --out, or delete it")
    return record


def verify_data(root: Path, splits: tuple[Split, Split], data: DataSpec) -> str:
    """Fingerprint of a data set: its generator's for scenes, else of the names of all files.

    Raises:
        ValueError: the spec wants other scenes than lie there.
    """
    if data.scenes is None:
        digest = hashlib.sha256()
        for split in splits:
            for path in split.paths:
                digest.update(Path(path).relative_to(split.root).as_posix().encode() + b"\n")
        return digest.hexdigest()[:16]
    record = read_record(root / RECORD)
    mine, theirs = dict(_leaves(data.scenes.model_dump(mode="json"))), dict(_leaves(record["spec"]))
    if differing := sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)):
        changes = "; ".join(f"{key} is {theirs.get(key)} there, {mine.get(key)} in the spec" for key in differing)
        raise ValueError(f"{root} holds other scenes than spec.data.scenes asks for: {changes}")
    return str(record["provenance"]["data_fingerprint"])


def parameters(model: PrunedViT) -> dict[str, int]:
    """Parameters in training form, and how many of them only training needs (the deployed form has one vector a
    reducer instead, no parameters)."""
    extra = sum(p.numel() for p in model.reducers.parameters())
    return {"parameters": sum(p.numel() for p in model.parameters()), "parameters_training_only": extra}


class _Validation:
    """The validation set, ready to be evaluated again and again."""

    def __init__(self, model: PrunedViT, split: Split, spec: TrainSpec, seed: int, world: World, workers: int) -> None:
        self.model, self.spec, self.seed, self.world = model, spec, seed, world
        size = max(1, spec.recipe.batch_size // (spec.recipe.accumulate * world.size))
        self.batches = EvalBatches(
            split,
            spec.data,
            size,
            rank=world.rank,
            world=world.size,
            workers=workers,
            pin_memory=world.device.type == "cuda",
        )
        self.objects = object_map(self.batches.paths, spec.data, patch_grid(model))

    def __call__(self) -> Evaluation:
        return evaluate(
            self.model,
            self.batches,
            objects=self.objects,
            device=self.world.device,
            total=self.world.sum,
            precision=self.spec.recipe.precision,
            seed=self.seed,
        )


def patch_grid(model: PrunedViT) -> tuple[int, int]:
    """Rows and columns of the patch grid that the model was built for."""
    rows, columns = model.backbone.host.patch_embed.grid_size
    return rows, columns


def _initial_model(spec: TrainSpec, init: Path | None, resuming: bool) -> PrunedViT:
    """The model with the weights to start from; a run that is resumed needs none."""
    known = spec.init in ("random", "timm")
    if known and init is not None:
        raise ValueError(f"spec.init = {spec.init}: takes no weights, but {init} was given; leave one of them out")
    pretrained = spec.init == "timm" and not resuming
    try:
        model = build_model(spec.model, spec.prune, spec.data.num_classes, spec.data.image_size, pretrained)
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


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
