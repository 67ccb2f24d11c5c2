"""The detector: a pruned plain ViT with windows, a simple feature pyramid, proposals, a cascade with masks.

    detector = build_detector(model, prune, DetModelSpec(), num_classes=80, image_size=1536)
    output = detector.train()(images, targets)          # output.losses
    found = detector.eval().detect(images, sizes)       # boxes, scores, labels, masks
    fast = detector.deploy()

Images are normalised. Each is padded with zeros at the right and the bottom to one canvas, the square that the model
was built for, so that detections do not depend on the batch. Larger images have larger canvases.

B batch, C channels of the encoder, G objects of an image, K classes without background, Q queries.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import Conv2dNormActivation

from cropr.pruning.backbones import Backbone, windowed
from cropr.pruning.fusion import Fusion
from cropr.pruning.model import Output, PrunedViT, prune
from cropr.pruning.reducers import Reducer
from cropr.pruning.schedule import Schedule
from cropr.pruning.tokens import Tokens
from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks.base import Losses, keep_last_block
from cropr.tasks.detection import DetModelSpec
from cropr.tasks.detection.cascade import CascadeHeads, Detections, ProposalNetwork, Size

if TYPE_CHECKING:
    from cropr.data.coco import Target


class Encoder(PrunedViT):
    """``logits`` of its output are the map [B, C, rows, columns]: the last block's tokens in their places. Raises
    ValueError for pruning without fusion, since the pyramid needs all tokens."""

    def __init__(
        self, backbone: Backbone, schedule: Schedule, reducers: Mapping[int, Reducer], fusion: Fusion | None
    ) -> None:
        if reducers and fusion is None:
            raise ValueError("a detector needs the whole map: choose a fusion that brings pruned tokens back, as 'llf'")
        super().__init__(backbone, schedule, reducers, fusion)

    def _predict(self, images: Tensor, tokens: Tokens, pruned: Mapping[int, Tokens]) -> Tensor:
        return tokens.raster().patches.unflatten(1, self.backbone.grid(images)).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, slots=True)
class DetectionOutput:
    """Output of a forward pass: in training mode scalars by name, whose sum is the main loss, in evaluation mode
    detections of each image, and the output of the encoder."""

    losses: dict[str, Tensor]
    detections: list[Detections]
    encoded: Output


class Detector(Encoder):
    """Encoder and heads. Made by ``build_detector``; ``deploy`` gives its inference form. It takes the parts of
    ``encoder``; sides of canvases are multiples of ``multiple`` pixels, for the windows and the coarsest level."""

    inherits: ClassVar[tuple[str, ...]] = ("neck", "rpn", "heads")
    """Parts that a run takes from its initial run, in addition to the encoder's host."""

    def __init__(
        self, encoder: Encoder, neck: SimpleFeaturePyramid, rpn: ProposalNetwork, heads: CascadeHeads, multiple: int
    ) -> None:
        reducers = {int(block): cast(Reducer, reducer) for block, reducer in encoder.reducers.items()}
        super().__init__(encoder.backbone, encoder.schedule, reducers, encoder.fusion)
        self.neck, self.rpn, self.heads, self.multiple = neck, rpn, heads, multiple
        self.canvas: Size = self.backbone.image_size
        """Height and width that images are padded to."""

    def forward(  # type: ignore[override]
        self,
        images: Tensor | Sequence[Tensor],
        targets: Sequence[Target] | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> DetectionOutput:
        """Losses in training mode, detections in evaluation mode, of images [B, 3, H, W] or B times [3, H_b, W_b].

        ``targets``, in training alone, are torchvision's: ``boxes`` [G, 4], ``labels`` [G] from 1, ``masks`` [G, H, W].
        ``sizes``: height and width of each image without padding, by default the targets' ``size``, else H and W.
        """
        if self.training and targets is None:
            raise ValueError("a detector in training mode needs targets; call eval() before you detect")
        if sizes is None:
            known: Sequence[Any] = targets or [{}] * len(images)
            sizes = [one.get("size", tuple(image.shape[-2:])) for image, one in zip(images, known, strict=True)]
        height, width = (max(sides) for sides in zip(*(self._canvas(image) for image in images), strict=True))
        # On one canvas, with zeros: the mean colour of normalised images.
        padded = [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
        batch = torch.stack(padded)
        encoded = super().forward(batch)
        levels = self.neck(encoded.logits)
        proposals, losses = self.rpn.propose(ImageList(batch, list(sizes)), levels, targets)
        if self.training:
            assert targets is not None
            losses |= self.heads.losses(levels[:-1], proposals, sizes, targets)
            return DetectionOutput(losses, [], encoded)
        return DetectionOutput({}, self.heads.detect(levels[:-1], proposals, sizes), encoded)

    @torch.no_grad()
    def detect(self, images: Tensor | Sequence[Tensor], sizes: Sequence[Size] | None = None) -> list[Detections]:
        """Detections of each image, independent of the other images; arguments as of ``forward``. Boxes are in pixels
        of the image as given, masks [M, 28, 28] are probabilities within their box."""
        if len({self._canvas(image) for image in images}) == 1:
            return self(images, sizes=sizes).detections
        alone = [slice(number, number + 1) for number in range(len(images))]
        return [self(images[one], sizes=sizes and sizes[one]).detections[0] for one in alone]

    def deploy(self) -> Detector:  # type: ignore[override]
        """The inference form, in evaluation mode: queries folded, training-only weights gone; shares no memory."""
        encoder = Encoder(*self._inference_parts())
        neck, rpn, heads = copy.deepcopy((self.neck, self.rpn, self.heads))
        return Detector(encoder, neck, rpn, heads, self.multiple).requires_grad_(False).eval()

    def _canvas(self, image: Tensor) -> Size:
        height, width = (_round_up(edge, self.multiple) for edge in image.shape[-2:])
        return max(self.canvas[0], height), max(self.canvas[1], width)


def build_detector(
    model: ModelSpec,
    spec: PruneSpec,
    detector: DetModelSpec,
    num_classes: int,
    image_size: int | Size,
    pretrained: bool = False,
) -> Detector:
    """The detector of a specification. ``image_size``, a side or height and width in pixels, is what images are padded
    to; it is rounded up to whole windows. Raises TypeError: a host that cannot have windows, by name; ValueError: a
    schedule that leaves no whole windows, a pruned model without fusion, levels that do not fit."""
    if (patch := model.args.get("patch_size")) is None:
        with torch.device("meta"):
            host: Any = timm.create_model(model.name, **model.args)
        patch, columns = host.patch_embed.feat_ratio(as_scalar=False)
        assert patch == columns
    multiple = patch * math.lcm(detector.window, max(1, round(1 / detector.scales[-1])))
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    canvas = (_round_up(height, multiple), _round_up(width, multiple))
    encoder = build_encoder(model, spec, detector, num_classes, canvas, pretrained)
    neck = SimpleFeaturePyramid(encoder.backbone.dim, detector.channels, patch, detector.scales)
    rpn = ProposalNetwork(detector, neck.strides)
    return Detector(encoder, neck, rpn, CascadeHeads(detector, num_classes, neck.strides[:-1]), multiple)


def build_encoder(
    model: ModelSpec,
    spec: PruneSpec,
    detector: DetModelSpec,
    num_outputs: int,
    image_size: int | Size,
    pretrained: bool = False,
) -> Encoder:
    """The encoder of a detector, a timm ViT or EVA-02 without prefix tokens, classifier and, as in ViTDet and EVA-02,
    final norm; the auxiliary heads have ``num_outputs``. The last block has no drop path where tokens are pruned, as in
    classification. Raises what ``build_detector`` raises."""
    arguments: dict[str, Any] = {"num_classes": 0, "class_token": False, "global_pool": "avg", "dynamic_img_size": True}
    arguments |= {"img_size": image_size, "drop_path_rate": model.drop_path, **model.args}
    host: Any = timm.create_model(model.name, **arguments)
    if pretrained:
        # timm loads positions only into a model with as many prefix tokens as they were made for.
        donor = timm.create_model(model.name, pretrained, **{**arguments, "class_token": True})
        weights = {name: tensor for name, tensor in donor.state_dict().items() if name != "cls_token"}
        weights["pos_embed"] = weights["pos_embed"][:, -host.pos_embed.shape[1] :]
        host.load_state_dict(weights)
    host.norm, host.fc_norm = nn.Identity(), nn.Identity()
    backbone, schedule = windowed(host, detector.window, detector.global_blocks), Schedule.from_config(spec.schedule)
    encoder = prune(backbone, schedule, spec.reducer, spec.fusion, spec.options, num_outputs, Encoder)
    if encoder.reducers:
        keep_last_block(host)
    return encoder


def losses(output: DetectionOutput, targets: Sequence[Target], num_classes: int, aux_weight: float = 1.0) -> Losses:
    """Sum of all losses of a detector in training mode (each has weight 1), plus the weighted sum of the auxiliary
    losses: Cropr modules predict the set of classes in the image, after cropping (paper, section 3: one query, sigmoid
    BCE). The paper does not give the reduction; ours is the mean over images, queries and classes."""
    main = torch.stack(tuple(output.losses.values())).sum()
    if not output.encoded.aux:
        return Losses(main, main, main.new_empty(0))
    logits = torch.stack(tuple(output.encoded.aux)).float()  # [modules, B, Q, K]
    present = torch.zeros(len(targets), num_classes, device=logits.device)
    for row, target in zip(present, targets, strict=True):
        row[target["labels"] - 1] = 1.0
    present = present[:, None].expand_as(logits)
    aux = F.binary_cross_entropy_with_logits(logits, present, reduction="none").mean(dim=(1, 2, 3))
    return Losses(main + aux_weight * aux.sum(), main, aux)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class SimpleFeaturePyramid(nn.Module):
    """Each level is resampled from the same map, of C = ``dim`` channels and ``stride`` pixels between neighbours; no
    top-down path (ViTDet, Li et al., 2022). ``scales`` of the levels against the input map are finest first, each half
    of the one before, among 4, 2, 1, 0.5; raises ValueError for others."""

    def __init__(self, dim: int, channels: int, stride: int, scales: Sequence[float] = (4, 2, 1, 0.5)) -> None:
        super().__init__()
        if not scales or set(scales) - {4, 2, 1, 0.5} or any(a != 2 * b for a, b in pairwise(scales)):
            raise ValueError(f"scales={tuple(scales)}: choose neighbours of 4, 2, 1, 0.5, finest first")
        self.branches = nn.ModuleList(_branch(dim, channels, scale) for scale in scales)
        strides = [int(stride / scale) for scale in scales]
        self.strides = (*strides, 2 * strides[-1])
        """Pixels between neighbours of every level, the last one included that only proposals are read from."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, C, H, W] to a map [B, D, h, w] a level, finest first; one more is the coarsest, subsampled."""
        levels = [branch(x) for branch in self.branches]
        return [*levels, levels[-1][:, :, ::2, ::2]]


def _branch(dim: int, channels: int, scale: float) -> nn.Sequential:
    """Resampling, then a 1 x 1 and a 3 x 3 convolution, each with a LayerNorm over channels."""
    resample: list[nn.Module] = [nn.MaxPool2d(2)] if scale < 1 else []
    if scale > 1:
        resample = [nn.ConvTranspose2d(dim, dim // 2, 2, 2)]
    if scale == 4:
        resample += [LayerNorm2d(dim // 2), nn.GELU(), nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2)]
    width = dim // int(max(scale, 1))
    convolve = {"norm_layer": LayerNorm2d, "activation_layer": None}
    return nn.Sequential(
        nn.Sequential(*resample),
        Conv2dNormActivation(width, channels, 1, **convolve),
        Conv2dNormActivation(channels, channels, 3, **convolve),
    )
