"""The detector: a pruned plain ViT with windows, a simple feature pyramid, proposals, a cascade with masks.

    detector = build_detector(model, prune, DetModelSpec(), num_classes=80, image_size=1536)
    output = detector.train()(images, targets)          # output.losses
    found = detector.eval().detect(images, sizes)       # boxes, scores, labels, masks
    fast = detector.deploy()

Images are normalised. Each is padded with zeros at the right and the bottom to one canvas, the square that the model
was built for: what is found in an image does not depend on its batch. Larger images have a canvas of their own.

B batch, C channels of the encoder, G objects of an image, M detections.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

from cropr.pruning.model import Output
from cropr.pruning.reducers import Reducer
from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks.base import Losses
from cropr.tasks.detection import DetModelSpec
from cropr.tasks.detection.auxiliary import auxiliary_losses, present_classes
from cropr.tasks.detection.cascade import CascadeHeads, Detections
from cropr.tasks.detection.encoder import Encoder, build_encoder
from cropr.tasks.detection.neck import SimpleFeaturePyramid
from cropr.tasks.detection.proposals import ProposalNetwork

if TYPE_CHECKING:
    from cropr.data.coco import Target

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, slots=True)
class DetectionOutput:
    """What a forward pass gives."""

    losses: dict[str, Tensor]
    """Scalars, unweighted, by name, in training mode; else empty. Their sum is the main loss."""
    detections: list[Detections]
    """One an image, in evaluation mode; else empty."""
    encoded: Output
    """Of the encoder; ``logits`` is its map [B, C, rows, columns], ``aux`` and ``kept`` as of any pruned model."""


class Detector(Encoder):
    """Encoder and heads. Made by ``build_detector``; ``deploy`` gives its inference form.

    Args:
        encoder: a pruned windowed ViT, whose parts become this model's own.
        neck: makes the pyramid.
        rpn: makes proposals.
        heads: what is in them.
        canvas: height and width that images are padded to; larger images to multiples of ``multiple``.
        multiple: pixels; a canvas of so many holds whole windows and whole places of the coarsest level.
    """

    inherits: ClassVar[tuple[str, ...]] = ("neck", "rpn", "heads")
    """Parts that a run takes over from the run that it starts from, beside the encoder's host."""

    def __init__(
        self,
        encoder: Encoder,
        neck: SimpleFeaturePyramid,
        rpn: ProposalNetwork,
        heads: CascadeHeads,
        canvas: Size,
        multiple: Size,
    ) -> None:
        reducers = {int(block): cast(Reducer, reducer) for block, reducer in encoder.reducers.items()}
        super().__init__(encoder.backbone, encoder.schedule, reducers, encoder.fusion)
        self.neck = neck
        self.rpn = rpn
        self.heads = heads
        self.canvas = canvas
        self.multiple = multiple

    def forward(  # type: ignore[override]
        self,
        images: Tensor | Sequence[Tensor],
        targets: Sequence[Target] | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> DetectionOutput:
        """Losses in training mode, detections in evaluation mode.

        Args:
            images: [B, 3, H, W] or B times [3, H_b, W_b].
            targets: torchvision's, one an image: ``boxes`` [G, 4], ``labels`` [G] from 1, ``masks`` [G, H, W]. In
                training only.
            sizes: of the images within H x W; what lies beyond is padding. By default the targets' ``size``, else
                there is no padding yet.

        Raises:
            ValueError: training without targets.
        """
        if self.training and targets is None:
            raise ValueError("a detector in training mode needs targets; call eval() before you detect")
        sizes = list(sizes or _sizes(images, targets))
        batch = self._pad(images)
        encoded = self.encode(batch)
        levels = self.neck(encoded.logits)
        proposals, losses = self.rpn.propose(ImageList(batch, sizes), levels, targets)
        regions = levels[:-1]
        if self.training:
            assert targets is not None
            return DetectionOutput({**losses, **self.heads.losses(regions, proposals, sizes, targets)}, [], encoded)
        return DetectionOutput({}, self.heads.detect(regions, proposals, sizes), encoded)

    def encode(self, images: Tensor) -> Output:
        """The encoder alone, on images [B, 3, H, W] that hold whole windows; ``logits`` is its map."""
        return super().forward(images)

    @torch.no_grad()
    def detect(self, images: Tensor | Sequence[Tensor], sizes: Sequence[Size] | None = None) -> list[Detections]:
        """What is found in each image, whatever the sizes of the others; arguments as of ``forward``.

        Boxes are in pixels of the image as given, masks [M, 28, 28] are probabilities within their box.
        """
        sizes = list(sizes or _sizes(images, None))
        groups: dict[Size, list[int]] = {}
        for number, image in enumerate(images):
            groups.setdefault(self._canvas(image), []).append(number)
        found: dict[int, Detections] = {}
        for members in groups.values():
            output = self([images[number] for number in members], sizes=[sizes[number] for number in members])
            found |= zip(members, output.detections, strict=True)
        return [found[number] for number in range(len(images))]

    def deploy(self) -> Detector:  # type: ignore[override]
        """The inference form, in evaluation mode: queries folded, training-only weights gone; shares no memory."""
        encoder = Encoder(*self._inference_parts())
        neck, rpn, heads = copy.deepcopy((self.neck, self.rpn, self.heads))
        return Detector(encoder, neck, rpn, heads, self.canvas, self.multiple).requires_grad_(False).eval()

    def _canvas(self, image: Tensor) -> Size:
        height, width = (
            max(floor, -(-edge // step) * step)
            for floor, edge, step in zip(self.canvas, image.shape[-2:], self.multiple, strict=True)
        )
        return height, width

    def _pad(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """[B, 3, H, W] on one canvas, with zeros: the mean colour of normalised images."""
        canvases = [self._canvas(image) for image in images]
        height, width = max(size[0] for size in canvases), max(size[1] for size in canvases)
        padded = [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
        return torch.stack(padded)


def build_detector(
    model: ModelSpec,
    spec: PruneSpec,
    detector: DetModelSpec,
    num_classes: int,
    image_size: int | Size,
    pretrained: bool = False,
) -> Detector:
    """The detector of a specification.

    Args:
        model: a timm ViT or EVA-02; see ``build_encoder``.
        num_classes: without background.
        image_size: pixels that images are padded to, a side or height and width; rounded up to whole windows.

    Raises:
        TypeError: a host that cannot have windows, by name.
        ValueError: a schedule that leaves no whole windows, a pruned model without fusion, levels that do not fit.
    """
    patch = _patch_size(model)
    multiple = patch * math.lcm(detector.window, max(1, round(1 / detector.scales[-1])))
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    canvas = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    encoder = build_encoder(model, spec, detector, num_classes, canvas, pretrained)
    neck = SimpleFeaturePyramid(encoder.backbone.dim, detector.channels, patch, detector.scales)
    rpn = ProposalNetwork(detector, neck.strides)
    heads = CascadeHeads(detector, num_classes, neck.strides[:-1])
    return Detector(encoder, neck, rpn, heads, canvas, (multiple, multiple))


def losses(output: DetectionOutput, targets: Sequence[Target], num_classes: int, aux_weight: float = 1.0) -> Losses:
    """Sum of all losses of the detector (each has weight 1), plus the weighted sum of the auxiliary losses.

    Args:
        output: of a model in training mode.
        targets: as given to it. Cropr modules learn which classes they hold (paper, section 3).
        num_classes: without background.
        aux_weight: weight of the sum of the auxiliary losses.
    """
    main = torch.stack(tuple(output.losses.values())).sum()
    aux = auxiliary_losses(output.encoded.aux, present_classes(targets, num_classes))
    return Losses(main + aux_weight * aux.sum(), main, aux)


def _sizes(images: Tensor | Sequence[Tensor], targets: Sequence[Target] | None) -> list[Size]:
    if targets is not None and all("size" in target for target in targets):
        return [target["size"] for target in targets]
    return [(image.shape[-2], image.shape[-1]) for image in images]


def _patch_size(model: ModelSpec) -> int:
    """Of a model that is not built yet: the canvas, which it is built for, depends on it."""
    if "patch_size" in model.args:
        return int(model.args["patch_size"])
    with torch.device("meta"):
        host: Any = timm.create_model(model.name, **model.args)
    rows, columns = host.patch_embed.patch_size
    assert rows == columns
    return int(rows)
