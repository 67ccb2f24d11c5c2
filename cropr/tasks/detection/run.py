"""Object detection as a training run asks for it: COCO's layout, the detector, box and mask AP."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cropr.data.coco import CocoSplit, EvalImages, Target, TrainImages, collate, fingerprint, load_coco
from cropr.data.loading import EvalBatches, TrainBatches
from cropr.distributed import ALONE, World
from cropr.tasks.base import DEFAULT, Evaluation, EvaluationSettings, Losses, TaskRun
from cropr.tasks.detection import DetModelSpec
from cropr.tasks.detection.checkpoint import load_eva02, read_checkpoint
from cropr.tasks.detection.evaluation import evaluate
from cropr.tasks.detection.model import DetectionOutput, Detector, build_detector, losses


class Detection(TaskRun):
    """Images with boxes and masks, as COCO has them."""

    def load(self, root: Path) -> tuple[CocoSplit, CocoSplit]:
        return load_coco(root, self.data.num_classes)

    @property
    def classes(self) -> Sequence[str]:
        return [name for _, name in self.splits[0].annotations.categories]

    def folder_fingerprint(self) -> str:
        return fingerprint(self.splits)

    def build(self, pretrained: bool = False) -> Detector:
        model, prune, shape = self.spec.model, self.spec.prune, (self.data.num_classes, self.data.image_size)
        return build_detector(model, prune, cast(DetModelSpec, self.spec.detector), *shape, pretrained)

    def load_published(self, model: Detector, path: Path) -> bool:
        """The published EVA-02 detectors, as their authors saved them (``.pth``)."""
        if path.suffix != ".pth":
            return False
        load_eva02(model, read_checkpoint(path))
        return True

    def batches(self, seed: int, world: World = ALONE, workers: int = 0) -> TrainBatches:
        images = TrainImages(self.splits[0], self.data, seed)
        return TrainBatches(images, self.spec.recipe.batch_size, seed, collate=collate, world=world, workers=workers)

    def evaluate(self, model: Detector, settings: EvaluationSettings = DEFAULT) -> Evaluation:
        """The twelve figures of COCO's evaluation for boxes and for masks, in percent."""
        images, how = EvalImages(self.splits[1], self.data), {"world": settings.world, "workers": settings.workers}
        batches = EvalBatches(images, settings.batch_size, collate=collate, **how)
        return evaluate(model, batches, self.splits[1].annotations, settings)

    def move(self, targets: list[Target], device: torch.device) -> list[Target]:
        return [
            cast(Target, {k: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for k, x in own.items()})
            for own in targets
        ]

    def split(self, targets: list[Target], parts: int) -> Sequence[list[Target]]:
        return [[targets[place] for place in part] for part in torch.arange(len(targets)).tensor_split(parts)]

    def forward(self, model: Any, images: Tensor, targets: list[Target]) -> DetectionOutput:
        return cast(DetectionOutput, model(images, targets))

    def loss(self, output: DetectionOutput, targets: list[Target]) -> Losses:
        return losses(output, targets, self.data.num_classes, self.spec.prune.aux_weight)
