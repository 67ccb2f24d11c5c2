"""Pruning maps of image classification: a class an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cropr.data.imagenet import eval_transform, load_splits
from cropr.data.loading import decode
from cropr.data.scenes import object_mask
from cropr.pruning.model import Output, build_model
from cropr.tasks.classification import DataSpec
from cropr.tasks.views.base import Arrays, Sample, View
from cropr.training.specs import TrainSpec


class ClassificationView(View):
    """Labels and predictions [n], and the truth of generated images, ``masks`` [n, H, W]."""

    def __init__(self, spec: TrainSpec, root: Path | None) -> None:
        super().__init__(spec, root)
        data = spec.data
        assert isinstance(data, DataSpec)
        self.split = load_splits(root, data.num_classes)[1] if root else None
        self.classes = self.split.classes if self.split else ()
        self.transform = eval_transform(data)
        self.model = build_model(spec.model, spec.prune, data.num_classes, data.image_size).eval()

    def labels(self) -> Sequence[int]:
        """See ``View``."""
        assert self.split is not None
        return self.split.labels

    def validation(self, index: int) -> Sample:
        """See ``View``."""
        assert self.split is not None
        path, label = self.split.paths[index], self.split.labels[index]
        image, mask = self.transform(decode(path)), object_mask(path)
        if mask is None or mask.shape != image.shape[-2:]:  # masks are not resized with their images
            return _sample(image, label, {})
        return _sample(image, label, {"masks": mask})

    def picture(self, path: Path) -> Sample:
        """See ``View``; its label is -1."""
        return _sample(self.transform(decode(path)), -1, {})

    def answer(self, sample: Sample, device: torch.device) -> tuple[Output, Arrays]:
        """See ``View``."""
        output: Output = self.model(sample.image[None].to(device))
        return output, {"predictions": np.array(output.logits.argmax().item())}


def _sample(image: Tensor, label: int, truth: Arrays) -> Sample:
    return Sample(image, (image.shape[-2], image.shape[-1]), {"labels": np.array(label), **truth})
