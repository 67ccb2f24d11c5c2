"""torchvision's region proposal network with the anchors and losses of EVA-02's detector.

Four things differ from torchvision's own: anchors are not rounded to pixels and take their strides from the pyramid
instead of guessing them from sizes; losses are L1 and BCE over a fixed number of samples, which are drawn by the
image's own seed; boxes are computed in float32 under any autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from cropr.tasks.detection import DetModelSpec

if TYPE_CHECKING:
    from cropr.data.coco import Target

RATIOS = (0.5, 1.0, 2.0)
"""Height over width of the anchors of each place."""


class Anchors(nn.Module):
    """Boxes of one size and three shapes around each place of every level, in float32. One a level: ``sizes``, the
    square root of the area in pixels, and ``strides``, pixels between neighbours."""

    def __init__(self, sizes: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(zip(sizes, strides, strict=True))

    def forward(self, canvas: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        """[anchors, 4] an image, level after level; all images of a batch have the same."""
        root = torch.tensor(RATIOS, device=maps[0].device).sqrt()
        anchors = []
        for (size, stride), values in zip(self.levels, maps, strict=True):
            half = torch.stack((torch.full_like(root, size) / root, size * root), dim=1) / 2
            places = (stride * torch.arange(edge, device=root.device) for edge in values.shape[-2:])
            y, x = torch.meshgrid(*places, indexing="ij")
            centre = torch.stack((x, y, x, y), dim=-1).view(-1, 1, 4)
            anchors.append((centre + torch.cat((-half, half), dim=1)).view(-1, 4))
        return [torch.cat(anchors)] * len(canvas.image_sizes)


class _Head(RPNHead):
    """Two 3 x 3 convolutions shared by all levels; logits and deltas in float32.

    torchvision initialises all layers with a standard deviation of 0.01, which suits 256 channels; with 16, two
    convolutions divide their input by 100. Here the convolutions start by their width, as those of the other heads do.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, len(RATIOS), conv_depth=2)
        for layer in self.conv.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: list[Tensor]) -> Any:
        return tuple([level.float() for level in levels] for levels in super().forward(x))


class Sampler:
    """Chooses up to ``count`` boxes of an image, at most the share ``positive`` of them on objects, by the image's own
    seed: neither the rest of the batch nor the process that has the image changes the choice."""

    def __init__(self, count: int, positive: float) -> None:
        self.count, self.most = count, int(count * positive)

    def __call__(self, labels: Tensor, target: Target) -> Tensor:
        """Which boxes [R], by their labels [R]: objects from 1, background 0, below 0 never chosen."""
        seed, device = target.get("seed"), labels.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        order = torch.rand(labels.shape, generator=generator, device=device)
        positive, negative = ((labels >= 1).nonzero()[:, 0], (labels == 0).nonzero()[:, 0])
        positive = positive[order[positive].argsort()[: self.most]]
        negative = negative[order[negative].argsort()[: self.count - len(positive)]]
        chosen = torch.zeros_like(labels, dtype=torch.bool)
        chosen[torch.cat((positive, negative))] = True
        return chosen


class ProposalNetwork(RegionProposalNetwork):
    """Maps to proposals; in training also ``loss_objectness`` and ``loss_rpn_box_reg``."""

    def __init__(self, spec: DetModelSpec, strides: Sequence[int]) -> None:
        before, after = ({"training": spec.proposals_train[i], "testing": spec.proposals_test[i]} for i in (0, 1))
        anchors, head = Anchors(spec.anchor_sizes, strides), _Head(spec.channels)
        # IoU of objects and of background, samples and the share of objects, proposals, IoU of suppression.
        super().__init__(anchors, head, 0.7, 0.3, spec.rpn_samples, 0.5, before, after, 0.7)
        self.sampler, self.targets = Sampler(spec.rpn_samples, 0.5), list[Any]()

    def propose(
        self, canvas: ImageList, levels: Sequence[Tensor], targets: Sequence[Target] | None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals [R, 4] an image, without gradient, and in training the losses."""
        self.targets = list(targets or ())  # torchvision does not pass them on to the loss
        boxes, losses = self(canvas, dict(enumerate(levels)), targets)
        return [box.detach() for box in boxes], losses

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """BCE of the sampled anchors and L1 of the positive ones, both over the number that sampling aims at."""
        sampled = torch.cat([self.sampler(*pair) for pair in zip(labels, self.targets, strict=True)])
        positive, expected = sampled & (torch.cat(labels) >= 1), self.sampler.count * len(labels)
        truth = torch.cat(labels)[sampled]
        objectness_loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], truth, reduction="sum")
        box_loss = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        return objectness_loss / expected, box_loss / expected
