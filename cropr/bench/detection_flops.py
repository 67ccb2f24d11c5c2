"""Multiply-accumulates of a detector: encoder by both counters, pyramid, proposals, heads.

Published numbers for EVA-02-L at 1536 px, 2790 and 1273 G, are patch embedding and linear layers alone, in MACs: a
counter that does not know fused attention misses its two products. The schedule that the paper does not spell out
follows from them, 9216 -> 6400 -> 4096 -> 2304 -> 1024 -> 256 tokens before the blocks 6, 9, 12, 15 and 21 (counted
from 1): it is the only one in equal steps of squares that gives 1273. Say which counter a number is from.

Heads cost the same with and without pruning, since fusion brings all tokens back. They are priced at the most regions
and detections that an image can have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from cropr.bench.flops import Macs, macs
from cropr.tasks.detection.regions import BOX_SIZE, MASK_SIZE

if TYPE_CHECKING:
    from cropr.bench.heads import Heads
    from cropr.tasks.detection.model import Detector


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMacs:
    """Multiply-accumulates of what follows the encoder, for one image."""

    neck: int
    proposals: int
    boxes: int
    """All stages on all regions that pass the suppression of proposals."""
    masks: int
    """On as many detections as are reported at most."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.neck + self.proposals + self.boxes + self.masks


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorMacs:
    """Multiply-accumulates for one image of the size that the detector was built for."""

    encoder: Macs
    """``total`` has all matrix products; ``linear`` is the counter behind the published numbers."""
    heads: HeadMacs

    @property
    def total(self) -> int:
        """Encoder and heads, all matrix products."""
        return self.encoder.total + self.heads.total


def detector_macs(model: Detector) -> DetectorMacs:
    """Price one image; dimensions are read from the modules, so that a model on the meta device will do.

    Args:
        model: in training form or deployed.
    """
    patch = model.backbone.host.patch_embed.patch_size[0]
    return DetectorMacs(encoder=macs(model), heads=head_macs(model, model.backbone.num_patches, patch))


def head_macs(model: Detector | Heads, patches: int, patch: int) -> HeadMacs:
    """Price what follows the encoder.

    Args:
        model: has it.
        patches: places of the encoder's map.
        patch: pixels a side of each.
    """
    spec = model.heads.spec
    places = [patches * patch * patch // (stride * stride) for stride in model.neck.strides]
    return HeadMacs(
        neck=sum(layers_macs(branch, patches) for branch in model.neck.branches),
        proposals=sum(layers_macs(model.rpn.head, level) for level in places),
        boxes=spec.proposals_test[1] * sum(layers_macs(stage, BOX_SIZE**2) for stage in model.heads.stages),
        masks=spec.max_detections * layers_macs(model.heads.mask_head, MASK_SIZE**2),
    )


def layers_macs(module: nn.Module, places: int) -> int:
    """Convolutions and linear layers of a module that runs them in their order, from a map of so many places.

    A transposed convolution of stride 2 makes four places of one, pooling one of four; padded convolutions keep them.
    Linear layers see the map as one vector.
    """
    total = 0
    for layer in module.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            total += layer.weight.numel() * places
            places *= layer.stride[0] * layer.stride[1]
        elif isinstance(layer, nn.MaxPool2d):
            places //= 4
        elif isinstance(layer, nn.Conv2d):
            total += layer.weight.numel() * places
        elif isinstance(layer, nn.Linear):
            total += layer.weight.numel()
    return total
