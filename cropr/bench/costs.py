"""What the parts of a forward pass cost on one device, measured once and kept on disk.

A pruned forward pass is the embedding, blocks on token counts that fall, a reducer after some of them, a fusion, and
norm and head. Whole passes are timed, cut at the borders of their blocks: the unpruned one, and probes that step down
through several token counts. So every part is timed where it runs, with weights that come from memory and activations
that the part before it left, and nothing between the parts is left out. Between counts, latency is interpolated, after
a monotone fit: fewer tokens are never predicted to take longer. Counts that are timed are multiples of 8 (and the full
count), where latency is smooth on devices that compute in tiles; what an unaligned count costs on top there is not
predicted, so plan with ``align=8`` on a GPU.

N tokens with prefix, P prefix tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from cropr.bench.attention import under
from cropr.bench.device import check, weights_dtype
from cropr.bench.models import UNPRUNED, build_variants, hosted, random_images, token_trace
from cropr.bench.specs import PlanSpec
from cropr.bench.timeline import dissect
from cropr.bench.timing import Run, Tell, clock, interleave, say_nothing, warm_up
from cropr.pruning.methods import before_last_block
from cropr.pruning.model import DeployedViT
from cropr.pruning.schedule import Schedule
from cropr.records import provenance, read_record, write_record
from cropr.runtime import reuse_freed_memory
from cropr.specs import PruneSpec

POINTS = 14
"""Token counts at which blocks are timed, about."""

_FORMAT = 2
"""Goes up when what is measured changes, so that old files are not read."""

_LOG = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds a batch of each part."""

    block: Mapping[int, float]
    """One block, by tokens with prefix that it computes on; rising."""
    reduce: Mapping[int, float]
    """Scoring, selection and gathering after one block, by tokens with prefix that it leaves; rising."""
    fixed: float
    """Embedding, norm and head: all that is no block of the unpruned model."""
    extra: float = 0.0
    """What a pruned model does once besides: bringing tokens back, reading pixels."""

    def blocks(self, tokens: Sequence[int]) -> float:
        """Sum over blocks that compute on so many tokens each."""
        return _sum(self.block, tokens)

    def reducers(self, tokens: Sequence[int]) -> float:
        """Sum over reducers after blocks that leave so many tokens each."""
        return _sum(self.reduce, tokens)


def load_costs(
    spec: PlanSpec,
    device: str = "cpu",
    cache: Path | None = None,
    fresh: bool = False,
    tell: Tell = say_nothing,
) -> Costs:
    """Costs from disk, or measured and written there.

    They are kept by all that they depend on: device, threads, versions of torch and timm, model, image size, batch,
    precision, reducer and fusion, rounds.

    Args:
        spec: its family, alignment and targets do not matter.
        device: torch's name of the device.
        cache: folder; None for ``CROPR_CACHE``, else the user's cache folder.
        fresh: measure even if there is a file.
        tell: called with a word on what comes next.

    Raises:
        Unsupported: the device cannot run this precision.
        ValueError: an impossible model.
    """
    started = time.time()
    key = _key(spec, device)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = (cache or default_cache()) / f"{digest}.json"
    if path.is_file() and not fresh:
        _LOG.info("costs from %s", path)
        return _read(path)
    costs = measure_costs(spec, device, tell)
    record = {"kind": "costs", "key": key, "costs": asdict(costs), "provenance": provenance(started, device=device)}
    write_record(path, record)
    return costs


def measure_costs(spec: PlanSpec, device: str = "cpu", tell: Tell = say_nothing) -> Costs:
    """Time every part; see ``load_costs``."""
    check(spec.precision, device)
    if device == "cpu":
        reuse_freed_memory()
    dtype = weights_dtype(spec.precision)
    models = build_variants(spec.model, _probes(spec), spec.image_size, device, dtype)
    blocks: Any = models[UNPRUNED].blocks
    images = random_images(spec.batch_size, spec.image_size, device, dtype, False)
    with torch.inference_mode():
        clocks = []
        for name, model in models.items():
            tell(f"warm up {name}")
            forward = under("auto", spec.precision, device, partial(model, images))
            run = warm_up(forward, 1, device, clock(Run(forward, 1), device))
            clocks.append(partial(dissect, run, blocks, device))
        readings = interleave(clocks, spec.rounds, tell)
    rounds = [_sort(models, parts) for parts in zip(*readings, strict=True)]
    seconds = typical({key: [one[key] for one in rounds] for key in rounds[0]})
    curves = {kind: {count: s for (of, count), s in seconds.items() if of == kind} for kind in ("block", "reduce")}
    fixed, *others = [s for (kind, _), s in seconds.items() if kind == "rest"]
    return Costs(
        block=monotone(curves["block"]),
        reduce=monotone(curves["reduce"] or {max(curves["block"]): 0.0}),
        fixed=fixed,
        extra=max(0.0, float(np.mean(others)) - fixed) if others else 0.0,
    )


def _probes(spec: PlanSpec) -> dict[str, PruneSpec]:
    """Schedules that, together, let a block run on every count of ``sample_counts``: steps down, as far as blocks go.

    None for a model so shallow that no block can be pruned after.
    """
    backbone = hosted(spec.model, PruneSpec(), spec.image_size).backbone
    full = backbone.num_patches + backbone.prefix
    *counts, _ = sample_counts(full, backbone.prefix)
    counts.reverse()
    sites = Schedule.constant(1).sites(backbone.depth, before_last_block(spec.prune.fusion))
    if not counts or not sites:
        return {}
    number = -(-len(counts) // len(sites))
    probes = {}
    for first in range(number):
        own = counts[first::number]
        steps = {site: own[i * len(own) // len(sites)] - backbone.prefix for i, site in enumerate(sites)}
        schedule = Schedule.kept(steps).to_config()
        probes[f"probe {first + 1} of {number}"] = spec.prune.model_copy(update={"schedule": schedule})
    return probes


def _sort(models: Mapping[str, nn.Module], passes: Sequence[np.ndarray]) -> dict[tuple[str, int], float]:
    """Parts of one pass of every model, by kind and by token count: means where a round has several.

    Kinds: ``block``; ``reduce``, by the count that the reducer is given; ``rest``, by the number of the model.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for number, (model, parts) in enumerate(zip(models.values(), passes, strict=True)):
        left = token_trace(model)
        fused = isinstance(model, DeployedViT) and model.model.fuses_early
        entering = [*left[:-2], left[0] if fused else left[-2]]
        rest = parts[0] + parts[-1]
        for i, count in enumerate(entering):
            found.setdefault(("block", count), []).append(parts[2 * i + 1])
            if i == len(entering) - 1:
                continue
            if left[i + 1] < count:
                found.setdefault(("reduce", count), []).append(parts[2 * i + 2])
            else:
                rest += parts[2 * i + 2]
        found["rest", number] = [rest]
    return {key: float(np.mean(values)) for key, values in found.items()}


def sample_counts(full: int, prefix: int, points: int = POINTS) -> list[int]:
    """Token counts to time: multiples of 8 in even steps from just above the prefix, and the full count."""
    low = -(-(prefix + 2) // 8) * 8
    step = max(8, round((full - low) / (points - 1) / 8) * 8)
    return sorted({*range(low, full, step), full})


def typical(series: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """The usual reading of every clock, from rounds in which all were read.

    What slows a whole round down does not count: readings are taken as shares of their round's sum, and the medians of
    the shares are scaled by the median sum.
    """
    readings = np.asarray(list(series.values()), dtype=float)  # clocks x rounds
    level = readings.sum(axis=0)
    shares = np.median(readings / level, axis=1)
    return dict(zip(series, (shares * np.median(level)).tolist(), strict=True))


def monotone(curve: Mapping[int, float]) -> dict[int, float]:
    """The rising curve nearest to this one in least squares: neighbours that fall are averaged."""
    pools: list[list[float]] = []
    for count in sorted(curve):
        pools.append([curve[count]])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    values = [float(np.mean(pool)) for pool in pools for _ in pool]
    return dict(zip(sorted(curve), values, strict=True))


def default_cache() -> Path:
    """``$CROPR_CACHE``, else ``cropr`` in the user's cache folder."""
    if folder := os.environ.get("CROPR_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cropr"


def _read(path: Path) -> Costs:
    """Costs as ``load_costs`` wrote them."""
    stored = read_record(path)["costs"]
    block, reduce = ({int(n): float(s) for n, s in stored.pop(name).items()} for name in ("block", "reduce"))
    return Costs(block=block, reduce=reduce, **stored)


def _sum(curve: Mapping[int, float], tokens: Sequence[int]) -> float:
    counts = sorted(curve)
    return float(np.interp(tokens, counts, [curve[count] for count in counts]).sum())


def _key(spec: PlanSpec, device: str) -> dict[str, Any]:
    """All that costs depend on."""
    origin = provenance(time.time(), device=device)
    prune: PruneSpec = spec.prune
    return {
        "format": _FORMAT,
        "machine": {name: origin[name] for name in ("device", "cpu", "threads")},
        "packages": {name: origin["packages"][name] for name in ("torch", "timm")},
        "model": spec.model.model_dump(mode="json"),
        "reducer": [prune.reducer, prune.options, prune.fusion],
        **{name: getattr(spec, name) for name in ("image_size", "batch_size", "precision", "rounds")},
    }
