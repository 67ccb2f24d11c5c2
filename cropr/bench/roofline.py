"""Predicted speed-ups on GPUs that are not at hand: a roofline, not a measurement.

Every operation takes as long as its arithmetic or its memory traffic, whichever is longer:
``max(FLOPs / (peak * efficiency), bytes / (bandwidth * STREAM))``. Peaks and bandwidths are the vendor's
(``config/published/devices.csv``); the two factors are assumptions, stated here and wherever a prediction is shown.
Left out are the start of kernels, tiles that a token count does not fill, and clocks that fall under load: so the
prediction holds for batches that fill the device and for aligned token counts, and is an upper estimate elsewhere.

B batch, N tokens with prefix, T = B N rows, C channels, K kept, R pruned.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cropr.bench.flops import block_dims, bound, macs
from cropr.bench.models import hosted
from cropr.pruning.backbones import Backbone, EvaBackbone
from cropr.pruning.methods import before_last_block
from cropr.pruning.schedule import Schedule, attended
from cropr.specs import ModelSpec, PruneSpec

EFFICIENCY = 0.5
"""Share of the peak that matrix products reach: an assumption. Speed-ups depend on it little; times do."""
RANGE = (0.3, 0.8)
"""Other assumptions for ``EFFICIENCY``, to show how little."""
STREAM = 0.8
"""Share of the bandwidth that everything else reaches: an assumption."""
BATCH = 128
"""Images. The paper's batch is not known to us; this one fills either device."""
BYTES = {"fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as its data sheet has it."""

    flops: float
    """Of dense matrix products, a second."""
    bandwidth: float
    """Bytes a second."""


@dataclass(frozen=True, slots=True)
class Row:
    """One of the paper's measurements of speed."""

    label: str
    model: ModelSpec
    image_size: int
    schedule: Schedule
    fusion: str


_VIT = ModelSpec(name="vit_large_patch16_224", args={"global_pool": "avg"})
_EVA_14 = ModelSpec(name="eva02_large_patch14_448")
_EVA_16 = ModelSpec(name="eva02_large_patch14_448", args={"patch_size": 16})
_STAGES = Schedule.stages({6: 50, 12: 50, 18: 50})

PAPER: dict[str, Row] = {
    "vit_l_r8": Row("ViT-L/16, 224 px, R=8", _VIT, 224, Schedule.constant(8), "none"),
    "vit_l_r8_llf": Row("ViT-L/16, 224 px, R=8, LLF", _VIT, 224, Schedule.constant(8), "llf"),
    "vit_l_r50": Row("ViT-L/16, 224 px, R=50 @ 6,12,18", _VIT, 224, _STAGES, "none"),
    "vit_l_r50_llf": Row("ViT-L/16, 224 px, R=50 @ 6,12,18, LLF", _VIT, 224, _STAGES, "llf"),
    "eva_l_448_r40_llf": Row("EVA-02-L, 448 px, R=40, LLF", _EVA_14, 448, Schedule.constant(40), "llf"),
    "eva_l_448_early": Row("EVA-02-L, 448 px, 80% @ 3", _EVA_14, 448, Schedule.fraction({3: 0.8}), "none"),
    "eva_l_512_r40_llf": Row("EVA-02-L/16, 512 px, R=40, LLF", _EVA_16, 512, Schedule.constant(40), "llf"),
}
"""The paper's schedules whose speed it reports, by the row of ``config/published/gpu_speed.csv``. The detector is left
out: its windows are not priced here. The encoder of the segmenter stands for the whole."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one operation asks of a device."""

    flops: float
    bytes: float

    def seconds(self, device: Device, efficiency: float = EFFICIENCY) -> float:
        """By the roofline."""
        return max(self.flops / (device.flops * efficiency), self.bytes / (device.bandwidth * STREAM))


def read_devices(path: Path, precision: str = "fp16") -> dict[str, Device]:
    """Devices by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a device lacks a number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no data sheets; restore it from the repository")
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    sheets: dict[str, dict[str, float]] = {}
    for line in csv.DictReader(lines):
        sheets.setdefault(line["row"], {})[line["quantity"]] = float(line["value"])
    wanted = (f"tflops_{precision}", "gb_per_s")
    for name, sheet in sheets.items():
        if missing := [quantity for quantity in wanted if quantity not in sheet]:
            raise ValueError(f"{path}: {name} has no {missing[0]}; it has {', '.join(sheet)}")
    return {name: Device(sheet[wanted[0]] * 1e12, sheet[wanted[1]] * 1e9) for name, sheet in sheets.items()}


def predict(
    row: Row,
    devices: Mapping[str, Device],
    batch_size: int = BATCH,
    precision: str = "fp16",
) -> dict[str, dict[str, float]]:
    """Speed-up on every device at ``EFFICIENCY``, its ``low`` and ``high`` over ``RANGE``, and the FLOP ``bound``.

    Args:
        row: model, image size and schedule.
        devices: of ``read_devices``, for the same precision.
        batch_size: images.
        precision: ``fp16`` (or bf16, which is as fast) or ``fp32``.
    """
    unpruned = hosted(row.model, PruneSpec(), row.image_size)
    prune = PruneSpec(reducer="cropr", fusion=row.fusion, schedule=row.schedule.to_config())
    backbone = unpruned.backbone
    limit = bound(macs(unpruned), macs(hosted(row.model, prune, row.image_size)))
    whole = list(works(backbone, Schedule.constant(0), row.fusion, batch_size, BYTES[precision]))
    parts = list(works(backbone, row.schedule, row.fusion, batch_size, BYTES[precision]))
    found = {}
    for name, device in devices.items():
        speedups = {
            efficiency: _total(whole, device, efficiency) / _total(parts, device, efficiency)
            for efficiency in (EFFICIENCY, *RANGE)
        }
        found[name] = {
            "speedup": speedups[EFFICIENCY],
            "low": min(speedups.values()),
            "high": max(speedups.values()),
            "bound": limit,
            "images_per_s": batch_size / _total(parts, device, EFFICIENCY),
        }
    return found


def table(path: Path, batch_size: int = BATCH, precision: str = "fp16") -> list[dict[str, Any]]:
    """A line for every row of ``PAPER`` and device of the file at ``path``; as a record holds them."""
    devices = read_devices(path, precision)
    return [
        {"row": name, "label": row.label, "device": device, "batch_size": batch_size, "precision": precision, **numbers}
        for name, row in PAPER.items()
        for device, numbers in predict(row, devices, batch_size, precision).items()
    ]


def works(backbone: Backbone, schedule: Schedule, fusion: str, batch_size: int, size: int) -> Iterator[Work]:
    """Every operation of a forward pass.

    Args:
        backbone: of the unpruned model; the meta device will do.
        schedule: what is pruned.
        fusion: ``llf`` or ``none``.
        batch_size: images.
        size: bytes of a number.
    """
    patches, prefix, dim = backbone.num_patches, backbone.prefix, backbone.dim
    fused = before_last_block(fusion)
    counts = schedule.resolve(patches, backbone.depth, fused, prefix)
    entering = attended(counts, patches, fused, prefix)
    rows, columns = backbone.host.patch_embed.patch_size
    yield _linear(3 * rows * columns, dim, batch_size * patches, size)
    for block, count in enumerate(entering, start=1):
        yield from block_works(backbone, block, batch_size, count, size)
        gone = count - prefix - counts[block - 1]
        if gone > 0 and block < backbone.depth:
            moved = count if fused else count - gone
            yield Work(0, size * batch_size * count * dim)  # every token is scored once
            yield Work(0, 2 * size * batch_size * moved * dim)  # read and written
    if fused and min(counts) < patches:
        yield Work(0, 2 * size * batch_size * (patches + prefix) * dim)
    yield Work(0, 2 * size * batch_size * entering[-1] * dim)  # norm and pooling


def block_works(backbone: Backbone, block: int, batch_size: int, tokens: int, size: int) -> Iterator[Work]:
    """One block: its linear layers, fused attention, and what only passes over memory."""
    module: Any = backbone.host.blocks[block - 1]
    dims = block_dims(module)  # refuses what it does not know
    rows, dim = batch_size * tokens, backbone.dim
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            yield _linear(layer.in_features, layer.out_features, rows, size)
    width = dims.attention_width
    yield Work(4 * batch_size * tokens**2 * width, size * 4 * rows * width)
    if isinstance(backbone, EvaBackbone):
        yield Work(0, size * 4 * rows * width)  # queries and keys are rotated: read and written
    norms = sum(layer.normalized_shape[0] for layer in module.modules() if isinstance(layer, nn.LayerNorm))
    hidden = [layer for layer in module.mlp.modules() if isinstance(layer, nn.Linear)]
    activation = sum(layer.out_features for layer in hidden[:-1]) + hidden[-1].in_features
    residuals = 2 * 3 * dim  # two sums, of two each
    yield Work(0, size * rows * (2 * norms + activation + residuals))


def _linear(inputs: int, outputs: int, rows: int, size: int) -> Work:
    return Work(2 * rows * inputs * outputs, size * (rows * (inputs + outputs) + inputs * outputs))


def _total(parts: list[Work], device: Device, efficiency: float) -> float:
    return sum(part.seconds(device, efficiency) for part in parts)
