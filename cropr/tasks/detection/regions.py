"""Heads for regions: pooling from the pyramid, box stages, mask head.

R regions of a batch, D channels of the pyramid, K classes without background. Labels run from 1 to K; 0 is background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import clip_boxes_to_image, roi_align
from torchvision.ops.poolers import LevelMapper

from cropr.tasks.detection import DetModelSpec

BOX_SIZE, MASK_SIZE = 7, 14
"""Side of the grid that a region is pooled to; masks have twice theirs."""


class RegionPooler:
    """Pools each region from the level that suits its size, with aligned RoIAlign and adaptive sampling.

    torchvision's own pooler is not aligned, and it infers the scales of the levels from the sizes of the first batch,
    wrongly where images are smaller than the canvas.

    ``strides`` of the levels are powers of 2, finest first; a region of ``size`` pixels a side is pooled from the level
    of ``stride``.
    """

    def __init__(self, strides: Sequence[int], size: int, stride: int) -> None:
        levels = [int(math.log2(edge)) for edge in strides]
        assert [2**level for level in levels] == list(strides)
        self.strides = tuple(strides)
        self.mapper = LevelMapper(levels[0], levels[-1], size, int(math.log2(stride)))

    def __call__(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], side: int) -> Tensor:
        """[R, D, side, side] of maps [B, D, h, w] and boxes [R_b, 4] of each image, in pixels."""
        number = torch.cat([torch.full_like(box[:, :1], image) for image, box in enumerate(boxes)])
        regions = torch.cat((number, torch.cat(list(boxes))), dim=1)
        level = self.mapper(list(boxes))
        pooled = levels[0].new_zeros(len(regions), levels[0].shape[1], side, side)
        for place, (values, stride) in enumerate(zip(levels, self.strides, strict=False)):
            rows = (level == place).nonzero()[:, 0]
            pooled[rows] = roi_align(values, regions[rows], side, 1 / stride, sampling_ratio=0, aligned=True)
        return pooled


class BoxStage(nn.Module):
    """One stage of the cascade: classes of the regions, and refined boxes, the same for all classes. The scale of its
    deltas (x, y, width, height) grows with its ``number``, which counts from 1."""

    def __init__(self, spec: DetModelSpec, num_classes: int, number: int) -> None:
        super().__init__()
        self.coder = BoxCoder((10.0 * number, 10.0 * number, 5.0 * number, 5.0 * number))
        shape, convolutions = (spec.channels, BOX_SIZE, BOX_SIZE), [spec.channels] * spec.box_convs
        self.head = FastRCNNConvFCHead(shape, convolutions, [spec.box_width], norm_layer=LayerNorm2d)
        self.classes = nn.Linear(spec.box_width, num_classes + 1)
        self.deltas = nn.Linear(spec.box_width, 4)
        for layer, std in ((self.classes, 0.01), (self.deltas, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, K + 1] and deltas [R, 4], in float32, of [R, D, 7, 7]."""
        x = self.head(pooled)
        return self.classes(x).float(), self.deltas(x).float()

    @torch.no_grad()
    def refine(self, deltas: Tensor, boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """The boxes [R_b, 4] of each image moved by their deltas and clipped to the image, without gradient."""
        moved = self.coder.decode_single(deltas, torch.cat(list(boxes))).split([len(box) for box in boxes])
        return tuple(clip_boxes_to_image(box, size) for box, size in zip(moved, sizes, strict=True))

    def loss(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the regions, and L1 of the deltas of those on an object divided by the number of all;
        arguments as in ``cascade.Regions``."""
        regions = max(len(labels), 1)
        positive = labels > 0
        wanted = self.coder.encode_single(truth[positive], boxes[positive])
        classes = F.cross_entropy(logits, labels, reduction="sum")
        return classes / regions, F.l1_loss(deltas[positive], wanted, reduction="sum") / regions


class MaskHead(nn.Sequential):
    """Regions [R, D, 14, 14] to mask logits [R, K, 28, 28], in float32."""

    def __init__(self, spec: DetModelSpec, num_classes: int) -> None:
        upsample = nn.ConvTranspose2d(spec.channels, spec.channels, 2, 2)
        nn.init.kaiming_normal_(upsample.weight, mode="fan_out", nonlinearity="relu")
        logits = nn.Conv2d(spec.channels, num_classes, 1)
        nn.init.normal_(logits.weight, std=0.001)
        for layer in (upsample, logits):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        convolutions = MaskRCNNHeads(spec.channels, [spec.channels] * spec.mask_convs, 1, norm_layer=LayerNorm2d)
        super().__init__(convolutions, upsample, nn.ReLU(), logits)

    def forward(self, pooled: Tensor) -> Tensor:
        return super().forward(pooled).float()


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """``x``, its gradient scaled from here on."""
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * scale)
    return x
