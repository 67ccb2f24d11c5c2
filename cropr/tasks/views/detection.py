"""Pruning maps of object detection: objects with boxes and masks.

The image is fitted into the square of the spec and padded to the model's canvas, which holds whole windows.
n objects of an image; h, w its size within the padding; H, W that of the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as v2

from cropr.data.coco import load_coco, normalise, read_image, read_masks
from cropr.data.jitter import fit
from cropr.data.loading import decode
from cropr.pruning.model import Output
from cropr.tasks.detection import DetDataSpec, DetModelSpec
from cropr.tasks.detection.masks import encode_masks
from cropr.tasks.detection.model import DetectionOutput, build_detector
from cropr.tasks.views.base import Arrays, Sample, View, object_image, rarest
from cropr.training.specs import TrainSpec

SAVED_SCORE = 0.3
"""Objects found with less confidence are left out: a mask of the paper's size has two million pixels."""


class DetectionView(View):
    """Objects, true and predicted: ``boxes`` [n, 4] in pixels of the canvas, ``classes`` [n] from 0, ``masks``
    [n, H, W], predicted ones with ``scores`` [n]; and ``masks`` [H, W] of all true objects together."""

    per_object: ClassVar[tuple[str, ...]] = ("true_", "predicted_")

    def __init__(self, spec: TrainSpec, root: Path | None) -> None:
        super().__init__(spec, root)
        assert isinstance(spec.data, DetDataSpec)
        assert isinstance(spec.detector, DetModelSpec)
        data = self.data = spec.data
        self.split = load_coco(root, data.num_classes)[1] if root else None
        numbers = tuple(f"class_{number}" for number in range(1, data.num_classes + 1))
        self.classes = tuple(name for _, name in self.split.annotations.categories) if self.split else numbers
        detector = build_detector(spec.model, spec.prune, spec.detector, data.num_classes, data.image_size)
        self.canvas = detector.canvas
        self.model = detector.eval()

    def labels(self) -> Sequence[int]:
        """The rarest class of each image; -1 for images without an object."""
        assert self.split is not None
        split = self.split
        return rarest([{instance.label for instance in split.instances(index)} for index in range(len(split))])

    def validation(self, index: int) -> Sample:
        """See ``View``."""
        assert self.split is not None
        file, masks = read_image(self.split, index), read_masks(self.split, index)
        image, size = self._fitted(file)
        instances = self.split.instances(index)
        scale = np.array([size[1] / file.shape[-1], size[0] / file.shape[-2]] * 2)
        resized = F.interpolate(masks.as_subclass(Tensor)[:, None], size, mode="nearest-exact")[:, 0]
        on = self._padded(resized).bool()
        truth = {
            "true_boxes": np.array([instance.box for instance in instances], float).reshape(-1, 4) * scale,
            "true_classes": np.array([instance.label - 1 for instance in instances], np.int64),
            "true_masks": on.numpy(),
            "masks": object_image(on.any(dim=0).numpy()),
        }
        return Sample(image, size, truth)

    def picture(self, path: Path) -> Sample:
        """See ``View``; no object of it is known."""
        return Sample(*self._fitted(v2.to_image(decode(path))), {})

    def answer(self, sample: Sample, device: torch.device) -> tuple[Output, Arrays]:
        """See ``View``."""
        output: DetectionOutput = self.model(sample.image[None].to(device), sizes=[sample.size])
        found = output.detections[0]
        sure = found.scores >= SAVED_SCORE
        boxes = found.boxes[sure].float().cpu()
        return output.encoded, {
            "predicted_boxes": boxes.numpy(),
            "predicted_classes": found.labels[sure].cpu().numpy() - 1,
            "predicted_scores": found.scores[sure].float().cpu().numpy(),
            "predicted_masks": self._pasted(found.masks[sure], boxes),
        }

    def _fitted(self, file: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image [3, H, W], and h, w of what it shows."""
        fitted = fit(file, self.data.image_size)
        return self._padded(normalise(fitted, self.data)), (fitted.shape[-2], fitted.shape[-1])

    def _padded(self, values: Tensor) -> Tensor:
        """[..., H, W]: zeros at the right and the bottom."""
        return F.pad(values, (0, self.canvas[1] - values.shape[-1], 0, self.canvas[0] - values.shape[-2]))

    def _pasted(self, masks: Tensor, boxes: Tensor) -> NDArray[np.bool_]:
        """[m, H, W] of masks [m, s, s] that lie in boxes [m, 4]."""
        codes = encode_masks(masks, boxes, self.canvas)
        return np.array([coco_mask.decode(code) for code in codes], bool).reshape(-1, *self.canvas)
