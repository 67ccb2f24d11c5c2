"""Semantic segmentation as a training run asks for it: ADE20k's layout, the segmenter, mIoU."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from cropr.data.ade20k import EvalImages, TrainImages, load_splits
from cropr.data.loading import EvalBatches, Share, TrainBatches
from cropr.pruning.model import DeployedViT, Output
from cropr.tasks import TrainSpec
from cropr.tasks.base import Evaluation, EvaluationSettings, Losses, TaskRun, autocast, names_fingerprint
from cropr.tasks.segmentation.inference import predict
from cropr.tasks.segmentation.metrics import confusion, scores
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
        return losses(output, targets, self.spec.prune.aux_weight)

    @torch.no_grad()
    def evaluate(
        self, model: PrunedSegmenter | DeployedViT, settings: EvaluationSettings, **share: Unpack[Share]
    ) -> Evaluation:
        """Metrics ``miou``, ``macc``, ``aacc`` (percent) from one confusion matrix over all images; series ``iou`` by
        class, None for classes that are neither labelled nor predicted."""
        training, device = model.training, settings.device
        model.eval()
        torch.manual_seed(settings.seed)

        def forward(windows: Tensor) -> Tensor:
            with autocast(device, settings.precision):
                output = model(windows)
            return output if isinstance(output, Tensor) else output.logits

        counts = torch.zeros(self.data.num_classes, self.data.num_classes, dtype=torch.int64, device=device)
        images = torch.zeros(1, dtype=torch.int64, device=device)
        for batch, labels in EvalBatches(EvalImages(self.splits[1], self.data), settings.batch_size, **share):
            logits = predict(forward, batch.to(device, non_blocking=True), labels.shape[-2:], self.data)
            counts += confusion(logits.argmax(dim=1), labels.to(device), self.data.num_classes)
            images += len(batch)
        model.train(training)
        metrics, iou = scores(settings.total(counts))
        return Evaluation({**metrics, "val_images": int(settings.total(images))}, {"iou": iou})
