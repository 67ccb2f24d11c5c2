"""What the parts of a forward pass cost on one device, measured once and kept on disk.

A pruned forward pass is the embedding, blocks on token counts that fall, a reducer after some of them, a fusion, and
norm and head. Each is timed by itself: blocks and reducers at several token counts, the rest as it is. Between counts,
latency is interpolated, after a monotone fit: fewer tokens are never predicted to take longer. Counts that are timed
are multiples of 8 (and the full count), where latency is smooth on devices that compute in tiles; what an unaligned
count costs on top there is not predicted, so plan with ``align=8`` on a GPU.

N tokens with prefix, P prefix tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from cropr.backbones import Backbone
from cropr.bench.attention import under
from cropr.bench.blocks import block_series
from cropr.bench.device import check, weights_dtype
from cropr.bench.models import build_variants, random_images
from cropr.bench.timing import Run, clock, interleave, warm_up
from cropr.model import DeployedViT, patch_variance
from cropr.records import provenance, read_record, write_record
from cropr.reducers import Context, Reducer
from cropr.runtime import reuse_freed_memory
from cropr.specs import ModelSpec, PlanSpec, PruneSpec
from cropr.tokens import Tokens

POINTS = 14
"""Token counts at which a block is timed, about."""

KEPT = 7 / 8
"""Share of the patches that the timed reducers keep."""

_FORMAT = 1
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
    embed: float
    head: float
    """Norm and classifier."""
    fuse: float = 0.0
    """Bringing all pruned tokens back."""
    pixels: float = 0.0
    """What a reducer that reads pixels computes once an image."""

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
    tell: Callable[[str], None] = lambda what: None,
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


def measure_costs(spec: PlanSpec, device: str = "cpu", tell: Callable[[str], None] = lambda what: None) -> Costs:
    """Time every part; see ``load_costs``."""
    check(spec.precision, device)
    if device == "cpu":
        reuse_freed_memory()
    dtype = weights_dtype(spec.precision)
    # Three blocks: one that is followed by a reducer, with a fusion before the last.
    small = ModelSpec(name=spec.model.name, args=spec.model.args | {"depth": 3})
    prune = spec.prune.model_copy(update={"schedule": {"stages": {"at": {"1": 1}, "align": 1}}})
    variants: Any = build_variants(small, {"pruned": prune}, spec.image_size, device, dtype)
    model: DeployedViT = variants["pruned"]
    backbone = model.model.backbone
    counts = sample_counts(backbone.num_patches + backbone.prefix, backbone.prefix)
    with torch.inference_mode():
        images = random_images(spec.batch_size, spec.image_size, device, dtype, False)
        parts = {
            name: under("auto", spec.precision, device, part) for name, part in _parts(model, images, counts).items()
        }
        runs = []
        for name, part in parts.items():
            tell(f"warm up {name}")
            runs.append(warm_up(part, 1, device, clock(Run(part, 1), device)))
        readings = interleave([partial(clock, run, device) for run in runs], spec.rounds, tell)
    seconds = typical(dict(zip(parts, readings, strict=True)))
    reduce = {int(name.partition(" ")[2]): seconds.pop(name) for name in list(seconds) if name.startswith("reduce ")}
    series = block_series(spec.model, counts, spec.batch_size, spec.precision, device, spec.rounds, tell=tell)
    return Costs(block=monotone(typical(series)), reduce=monotone(reduce), **seconds)


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


def _parts(model: DeployedViT, images: torch.Tensor, counts: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """Everything but the blocks, by name."""
    backbone, fusion = model.model.backbone, model.model.fusion
    reducer: Any = model.model.reducers["1"]
    full, position = backbone.embed(images)
    parts: dict[str, Callable[[], Any]] = {
        "embed": lambda: backbone.embed(images),
        "head": lambda: backbone.head(backbone.norm(full)),
    }
    if reducer.wants_pixels:
        parts["pixels"] = lambda: patch_variance(images, backbone.grid(images))
    pixels = patch_variance(images, backbone.grid(images)) if reducer.wants_pixels else None
    for count in sorted({*counts[-1::-4], counts[0]}):
        tokens = first_tokens(full, count)
        parts[f"reduce {count}"] = partial(_reduce, backbone, reducer, tokens, position, pixels, fusion is not None)
    if fusion is not None:
        half = full.num_patches // 2
        rows = torch.arange(full.num_patches, device=images.device).expand(len(images), -1)
        kept, pruned = full.keep(rows[:, :half]), full.cut(rows[:, half:])
        parts["fuse"] = partial(fusion, kept, {1: pruned})
    return parts


def first_tokens(full: Tokens, count: int) -> Tokens:
    """The prefix and the first patches, ``count`` in all."""
    return Tokens(full.x[:, :count].contiguous(), full.index[:, : count - full.prefix].contiguous(), full.prefix)


def _reduce(
    backbone: Backbone, reducer: Reducer, tokens: Tokens, position: Any, pixels: torch.Tensor | None, fused: bool
) -> Tokens:
    """One reducer with what it reads."""
    attention = backbone.cls_attention(1, tokens, position) if reducer.wants_attention else None
    keep = min(tokens.num_patches - 1, round(tokens.num_patches * KEPT))
    return reducer(tokens, keep, Context(attention, pixels), want_pruned=fused).kept


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
