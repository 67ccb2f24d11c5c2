"""Semantic segmentation as a training run asks for it: ADE20k's layout, the segmenter, mIoU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from cropr.data.ade20k import IGNORE, EvalImages, TrainImages, load_splits
from cropr.data.loading import EvalBatches, Share, TrainBatches
from cropr.data.scenes import OBJECT, object_patches
from cropr.pruning.model import DeployedViT, Output
from cropr.tasks import TrainSpec
from cropr.tasks.base import Evaluation, EvaluationSettings, Losses, TaskRun, autocast, names_fingerprint
from cropr.tasks.per_image import in_order
from cropr.tasks.scoring import Scoring
from cropr.tasks.segmentation.inference import predict
from cropr.tasks.segmentation.metrics import count_pixels, scores
from cropr.tasks.segmentation.model import PrunedSegmenter, build, losses


class Segmentation(TaskRun):
    """Images with label maps, as ADE20k has them."""

    def __init__(self, spec: TrainSpec, root: Path) -> None:
        super().__init__(spec, root)
        self.splits = load_splits(root)

    def folder_fingerprint(self) -> str:
        return names_fingerprint(self.splits[0].root, (path for split in self.splits for path in split.images))

    def build(self, pretrained: bool = False) -> PrunedSegmenter:
        return build(self.spec.model, self.spec.prune, self.data.num_classes, self.data.image_size, pretrained)

    def batches(self, seed: int, **share: Unpack[Share]) -> TrainBatches:
        return TrainBatches(TrainImages(self.splits[0], self.data, seed), self.spec.recipe.batch_size, seed, **share)

    def loss(self, output: Output, targets: Tensor) -> Losses:
        return losses(output, targets, self.spec.prune.aux_weight, self.spec.recipe.aux_ignore)

    @torch.no_grad()
    def evaluate(
        self, model: PrunedSegmenter | DeployedViT, settings: EvaluationSettings, **share: Unpack[Share]
    ) -> Evaluation:
        """Metrics ``miou``, ``macc``, ``aacc`` (percent) from the pixels of all images; series ``iou`` by class, None
        for classes that are neither labelled nor predicted, and ``scoring`` (``cropr.tasks.scoring``). Images:
        ``pixels`` [n, 3, C] of ``count_pixels``."""
        training, device = model.training, settings.device
        scoring, host = Scoring(model), (model.model if isinstance(model, DeployedViT) else model).backbone.host
        model.eval()
        torch.manual_seed(settings.seed)

        def forward(windows: Tensor) -> Tensor:
            with autocast(device, settings.precision), scoring:
                output = model(windows)
            return output if isinstance(output, Tensor) else output.logits

        counts, split = [], self.splits[1]
        batches = EvalBatches(EvalImages(split, self.data), settings.batch_size, **share)
        for batch, labels in batches:
            scoring.on_object = self._objects(labels, host.patch_embed.grid_size)
            logits = predict(forward, batch.to(device, non_blocking=True), labels.shape[-2:], self.data)
            counts.append(count_pixels(logits.argmax(dim=1), labels.to(device), self.data.num_classes).int().cpu())
        model.train(training)
        pixels = torch.cat(counts).numpy() if counts else np.zeros((0, 3, self.data.num_classes), np.int32)
        names = np.array([Path(split.images[index]).stem for index in batches.indices])
        found = in_order(settings.gather, batches.indices, {"image": names, "pixels": pixels})
        metrics, iou = scores(torch.from_numpy(found["pixels"]).sum(dim=0))
        series: dict[str, list[Any]] = {"iou": iou, **scoring.series(settings.total)}
        return Evaluation({**metrics, "val_images": len(found["image"])}, series, found)

    def _objects(self, labels: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """[B, N] bool: patches on an object, of labels [B, H, W] of scenes, in which 0 is background; None for images
        that are not scenes, or that are not predicted as they were drawn."""
        if self.data.scenes is None or self.data.scenes.image_size != self.data.image_size:
            return None
        masks = np.where((labels > 0) & (labels != IGNORE), OBJECT, 0)
        return torch.stack([torch.from_numpy(object_patches(mask, grid)) for mask in masks])
