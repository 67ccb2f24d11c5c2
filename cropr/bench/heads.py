"""What follows the encoder of a detector: pyramid, proposals, box and mask heads, with random weights.

A whole model's time is its encoder's plus that of the heads, for which one measurement serves. They get as many
proposals, candidate boxes and masks as an image can have, so that the whole model's speed-up is rather too low than too
high. Masks are not pasted into the image.

B batch, C channels of the encoder, M detections of the batch.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from cropr.pruning.flops import counts
from cropr.tasks.detection import DetModelSpec
from cropr.tasks.detection.cascade import BOX_SIZE, MASK_SIZE, CascadeHeads, ProposalNetwork
from cropr.tasks.detection.model import SimpleFeaturePyramid

NUM_CLASSES = 80
"""COCO's."""


class Heads(nn.Module):
    """The encoder's map [B, C, rows, columns] to the scores [M] of all detections. Whatever its score, a box is a
    candidate. ``dim`` is C, ``patch`` the pixels a side of a place of the map, ``grid`` its rows and columns."""

    def __init__(self, spec: DetModelSpec, dim: int, patch: int, grid: tuple[int, int]) -> None:
        super().__init__()
        candidates = spec.model_copy(update={"min_score": 0.0})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.neck = SimpleFeaturePyramid(dim, spec.channels, patch, spec.scales)
            self.rpn = ProposalNetwork(candidates, self.neck.strides)
            self.heads = CascadeHeads(candidates, NUM_CLASSES, self.neck.strides[:-1])
        self.patch, self.shape = patch, (dim, *grid)

    def forward(self, features: Tensor) -> Tensor:
        rows, columns = features.shape[-2:]
        sizes = [(rows * self.patch, columns * self.patch)] * len(features)
        levels = self.neck(features)
        proposals, _ = self.rpn.propose(ImageList(features, sizes), levels, None)
        return torch.cat([found.scores for found in self.heads.detect(levels[:-1], proposals, sizes)])

    def macs(self) -> int:
        """Multiply-adds for one image, without the pooling of regions, which multiplies no matrices."""
        dim, rows, columns = self.shape
        spec = self.heads.spec
        empty = partial(torch.empty, device="meta")
        levels = [empty(1, spec.channels, rows * self.patch // s, columns * self.patch // s) for s in self.neck.strides]
        boxes = empty(spec.proposals_test[1], spec.channels, BOX_SIZE, BOX_SIZE)
        masks = empty(spec.max_detections, spec.channels, MASK_SIZE, MASK_SIZE)
        parts = [(self.neck, empty(1, dim, rows, columns)), (self.rpn.head, levels), (self.heads.mask_head, masks)]
        parts += [(stage, boxes) for stage in self.heads.stages]
        return sum(sum(counts(part, x)["Global"].values()) for part, x in parts)
