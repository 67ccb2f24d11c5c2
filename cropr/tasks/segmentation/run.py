"""Semantic segmentation: a prediction per patch, upsampled; one query per patch in every Cropr module; mIoU.

B batch, P prefix tokens, N = h w patches, K survivors, C classes, Q queries, M Cropr modules, H and W pixels. Images
are normalised, so that padding with zeros is padding with the mean colour.
"""

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import cropr.tasks.base as base
from cropr.data.ade20k import IGNORE, EvalImages, Split, TrainImages, load_splits
from cropr.data.loading import EvalBatches, TrainBatches, pad
from cropr.data.scenes import OBJECT, object_patches
from cropr.distributed import ALONE, World
from cropr.pruning.backbones import Backbone
from cropr.pruning.fusion import Fusion
from cropr.pruning.methods import REDUCERS
from cropr.pruning.model import DeployedViT, Output, PrunedViT
from cropr.pruning.reducers import Reducer
from cropr.pruning.reducers.select import Cropr
from cropr.pruning.schedule import Schedule
from cropr.pruning.tokens import Tokens, take
from cropr.tasks.base import DEFAULT, Evaluation, EvaluationSettings, Losses, TaskRun, autocast, build_model
from cropr.tasks.scoring import Scoring
from cropr.tasks.segmentation import SegDataSpec


class Segmentation(TaskRun):
    """Images with label maps, as ADE20k has them."""

    def load(self, root: Path) -> tuple[Split, Split]:
        return load_splits(root)

    def folder_fingerprint(self) -> str:
        return base.names_fingerprint(self.splits[0].root, (path for split in self.splits for path in split.images))

    def build(self, pretrained: bool = False) -> "PrunedSegmenter":
        shape = self.data.num_classes, self.data.image_size
        return build_model(self.spec.model, self.spec.prune, *shape, pretrained, PrunedSegmenter)

    def batches(self, seed: int, world: World = ALONE, workers: int = 0) -> TrainBatches:
        images = TrainImages(self.splits[0], self.data, seed)
        return TrainBatches(images, self.spec.recipe.batch_size, seed, world=world, workers=workers)

    def loss(self, output: Output, targets: Tensor) -> Losses:
        return losses(output, targets, self.spec.prune.aux_weight, self.spec.recipe.aux_ignore)

    @torch.no_grad()
    def evaluate(self, model: "PrunedSegmenter | DeployedViT", settings: EvaluationSettings = DEFAULT) -> Evaluation:
        """Metrics and series ``iou`` of ``scores``, series of ``Scoring``; images: ``pixels`` of ``count_pixels``."""
        training, world, device = model.training, settings.world, settings.world.device
        scoring, host = Scoring(model), (model.model if isinstance(model, DeployedViT) else model).backbone.host
        model.eval()
        torch.manual_seed(settings.seed)

        def forward(windows: Tensor) -> Tensor:
            with autocast(device, settings.precision), scoring:
                output = model(windows)
            return output if isinstance(output, Tensor) else output.logits

        counts, split = [], self.splits[1]
        images = EvalImages(split, self.data)
        batches = EvalBatches(images, settings.batch_size, world=world, workers=settings.workers)
        for batch, labels in batches:
            scoring.on_object = self._objects(labels, host.patch_embed.grid_size)
            logits = predict(forward, batch.to(device, non_blocking=True), labels.shape[-2:], self.data)
            counts.append(count_pixels(logits.argmax(dim=1), labels.to(device), self.data.num_classes).int().cpu())
        model.train(training)
        pixels = torch.cat(counts).numpy() if counts else np.zeros((0, 3, self.data.num_classes), np.int32)
        names = np.array([Path(split.images[index]).stem for index in batches.indices])
        found = base.in_order(world.gather, batches.indices, {"image": names, "pixels": pixels})
        metrics, iou = scores(torch.from_numpy(found["pixels"]).sum(dim=0))
        series: dict[str, list[Any]] = {"iou": iou, **scoring.series(world.sum)}
        return Evaluation({**metrics, "val_images": len(found["image"])}, series, found)

    def _objects(self, labels: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """[B, N] bool: patches on an object, of labels [B, H, W] of scenes, in which 0 is background; None for images
        that are not scenes, or that are not predicted as they were drawn."""
        if self.data.scenes is None or self.data.scenes.image_size != self.data.image_size:
            return None
        masks = np.where((labels > 0) & (labels != IGNORE), OBJECT, 0)
        return torch.stack([torch.from_numpy(object_patches(mask, grid)) for mask in masks])


Forward = Callable[[Tensor], Tensor]
"""Images [B, 3, S, S] to logits [B, C, S, S]."""


def predict(forward: Forward, images: Tensor, size: tuple[int, int], spec: SegDataSpec) -> Tensor:
    """Logits [B, C, H, W] for images as ``cropr.data.ade20k.EvalImages`` gives them: by ``predict_sliding``, or the
    authors' way (pad to one window, predict, crop the padding off, enlarge the logits bilinearly to ``size``)."""
    if spec.evaluation == "slide":
        return predict_sliding(forward, images, spec.image_size, spec.stride or spec.image_size)
    logits = _forward_padded(forward, images, spec.image_size)
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def predict_sliding(forward: Forward, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits [B, C, H, W] of images [B, 3, H, W]: the mean over all windows that cover a pixel (mmseg's ``slide``).
    Windows begin every ``stride`` pixels; the last of a row or column is moved back to end with the image. Smaller
    images are padded. Raises ValueError: windows that leave gaps."""
    if stride > window:
        raise ValueError(f"stride {stride} leaves gaps between windows of {window} px; lower it to at most {window}")
    ends = (max(side - window, 0) for side in images.shape[-2:])
    tops, lefts = ([*range(0, end, stride), end] for end in ends)
    total, times = torch.zeros(()), torch.zeros(images.shape[-2:], device=images.device)
    for top, left in product(tops, lefts):
        area = (..., slice(top, top + window), slice(left, left + window))
        logits = _forward_padded(forward, images[area], window)
        if not total.ndim:
            total = logits.new_zeros((*logits.shape[:2], *images.shape[-2:]))
        total[area] += logits
        times[area[1:]] += 1
    return total / times


def _forward_padded(forward: Forward, images: Tensor, window: int) -> Tensor:
    """Logits in fp32 of images [B, 3, h, w] that are at most as large as a window."""
    height, width = images.shape[-2:]
    return forward(pad(images, window))[..., :height, :width].float()


def count_pixels(prediction: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pixels of each image and class that are right, labelled, and predicted: [B, 3, C] int64, of two tensors [B, ...]
    of any integer type. Pixels whose label is ``IGNORE`` count nowhere."""
    assert prediction.shape == labels.shape, (prediction.shape, labels.shape)
    known, images = labels != IGNORE, len(labels)
    first = torch.arange(images, device=labels.device).view(-1, *[1] * (labels.ndim - 1)) * num_classes
    chosen = ((labels, known & (prediction == labels)), (labels, known), (prediction, known))
    places = [(first + values.long())[which] for values, which in chosen]
    counts = [torch.bincount(place, minlength=images * num_classes).view(images, num_classes) for place in places]
    return torch.stack(counts, dim=1)


def scores(counts: Tensor) -> tuple[dict[str, float], list[float | None]]:
    """Scores in percent from ``count_pixels``, summed over images to [3, C]; as mmseg defines them: ``miou``, mean IoU
    over the classes that are labelled or predicted somewhere; ``macc``, mean over the labelled classes of the share of
    their pixels that are right; ``aacc``, share of all labelled pixels that are right. And the IoU of each class: None
    for one that is neither labelled nor predicted. Raises ValueError: there is no labelled pixel."""
    counts = counts.double().cpu()
    right, labelled, predicted = counts
    if not (total := labelled.sum()):
        raise ValueError("no pixel of the validation set is labelled; see `python -m cropr data check --layout ade20k`")
    iou = 100 * right / (labelled + predicted - right)  # 0 / 0 for absent classes
    accuracy = 100 * right / labelled
    means = {"miou": iou.nanmean(), "macc": accuracy.nanmean(), "aacc": 100 * right.sum() / total}
    return {name: mean.item() for name, mean in means.items()}, [None if x != x else x for x in iou.tolist()]


class PrunedSegmenter(PrunedViT):
    """A host with token pruning that predicts a class for every pixel: logits [B, classes, H, W].

    The host's norm and linear classifier serve every token (the authors' head); the predictions return to raster order
    and are upsampled bilinearly. Patches that no fusion brought back take that of the nearest survivor (our reading).

    Images may have any size that the host takes; modules with queries are trained on images of the size that the host
    was built for, since each query belongs to one patch. Raises TypeError for a host without a linear classifier that
    suits single tokens, ValueError for modules with another number of queries than there are patches.
    """

    dense: ClassVar[bool] = True

    def __init__(
        self, backbone: Backbone, schedule: Schedule, reducers: Mapping[int, Reducer], fusion: Fusion | None
    ) -> None:
        backbone.verify_predict()
        super().__init__(backbone, schedule, reducers, fusion)
        for reducer in reducers.values():
            if isinstance(reducer, Cropr):
                _require_queries(reducer.scorer.queries.shape[1], backbone.grid_size)

    @classmethod
    def default_options(cls, reducer: str, backbone: Backbone) -> dict[str, Any]:
        """One query per patch."""
        return {"num_queries": backbone.num_patches} if "num_queries" in REDUCERS[reducer].options else {}

    def _predict(self, images: Tensor, tokens: Tokens, pruned: Mapping[int, Tokens]) -> Tensor:
        scores = self._fuse("after_head", self.backbone.predict(tokens), pruned)
        patches = spread(scores, self.backbone.grid(images))
        return F.interpolate(patches, images.shape[-2:], mode="bilinear", align_corners=False)


def spread(tokens: Tokens, grid: tuple[int, int]) -> Tensor:
    """Values of the patch tokens at their places, [B, C, h, w]; empty places take those of the token that their patch
    went into, or of the nearest patch alive: Euclidean in the grid, the first in raster order of several."""
    assert tokens.index is not None
    size, columns, device = grid[0] * grid[1], grid[1], tokens.index.device
    if tokens.source is not None:
        source = tokens.source
    elif tokens.num_patches == size:
        position = torch.arange(size, device=device).expand_as(tokens.index)
        source = torch.empty_like(tokens.index).scatter(1, tokens.index, position)
    else:
        place, alive = torch.arange(size, device=device)[:, None], tokens.index[:, None]
        distance = (place // columns - alive // columns) ** 2 + (place % columns - alive % columns) ** 2
        source = (distance * size + alive).argmin(dim=2)  # over [B, h w, K]
    return take(tokens.x, source + tokens.prefix).transpose(1, 2).unflatten(2, grid)


def losses(output: Output, target: Tensor, aux_weight: float = 1.0, aux_ignore: int | None = None) -> Losses:
    """Main loss plus the weighted sum of the auxiliary losses: cross-entropy over all labelled pixels, or patches but
    those of class ``aux_ignore``. A batch without a label gives zeros. Means are over the labels of the batch, as in
    the authors' code; micro-batches of an accumulated step, and processes, weigh by images.

    ``target`` is [B, H, W] integers, ``IGNORE`` where there is no label. The target of an auxiliary prediction
    [B, Q, classes] is the label of each patch (``patch_labels``); raises ValueError for another grid than the images'.
    """
    target = target.long()
    main = F.cross_entropy(output.logits.float(), target, ignore_index=IGNORE, reduction="sum") / _labelled(target)
    if not output.aux:
        return Losses(main + output.extra_loss, main, main.new_empty(0))
    _require_queries(output.aux[0].shape[1], output.grid)
    logits = torch.stack(output.aux).float()  # [M, B, Q, classes]
    labels = patch_labels(target, output.grid).flatten(1).expand(logits.shape[:3])
    if aux_ignore is not None:
        labels = labels.masked_fill(labels == aux_ignore, IGNORE)
    each = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=IGNORE, reduction="none")
    aux = each.view(len(logits), -1).sum(dim=1) / _labelled(labels[0])
    return Losses(main + aux_weight * aux.sum() + output.extra_loss, main, aux)


def patch_labels(target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels [B, h, w] of the patches of maps [B, H, W]: those of the pixels in their upper left corners."""
    return F.interpolate(target[:, None].float(), grid, mode="nearest")[:, 0].long()


def _labelled(target: Tensor) -> Tensor:
    return (target != IGNORE).sum().clamp(min=1)


def _require_queries(queries: int, grid: tuple[int, int]) -> None:
    if queries != (patches := grid[0] * grid[1]):
        fix = f"set num_queries to {patches}, or train on images of {queries} patches (evaluation takes any)"
        grid_text = f"a grid of {grid[0]} x {grid[1]} patches: one a patch, which ties training to one grid"
        raise ValueError(f"{queries} queries for {grid_text}; {fix}")
