"""Pruning maps of semantic segmentation: a class a pixel.

The image is shrunk into one window, as in the authors' evaluation, whether windows slide in this run's or not: a map
belongs to one forward pass. S side of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors

from cropr.data.ade20k import IGNORE, EvalTransform, Split, decode_map, load_splits, read_pair
from cropr.data.loading import decode
from cropr.data.scenes import CLASSES
from cropr.pruning.model import Output
from cropr.tasks.segmentation import SegDataSpec
from cropr.tasks.segmentation.model import build
from cropr.tasks.views.base import Arrays, Sample, View, object_image, rarest
from cropr.training.specs import TrainSpec

LOOKED_AT = 500
"""Annotations that are read to choose images by, at most, evenly spaced: a second for photos."""
NAMES = "objectInfo150.txt"
"""ADE20k's own table of its classes, in the root; the name is its last column, synonyms after commas."""


class SegmentationView(View):
    """``label_maps`` and ``prediction_maps`` [n, S, S] uint8, ``IGNORE`` where there is no label or no image; and
    ``masks`` [n, S, S] of generated images."""

    def __init__(self, spec: TrainSpec, root: Path | None) -> None:
        super().__init__(spec, root)
        assert isinstance(spec.data, SegDataSpec)
        self.data = spec.data
        self.split = load_splits(root)[1] if root else None
        self.classes = _names(self.data, self.split)
        self.transform = EvalTransform(self.data.model_copy(update={"evaluation": "single"}))
        self.model = build(spec.model, spec.prune, self.data.num_classes, self.data.image_size).eval()

    def labels(self) -> Sequence[int]:
        """The rarest class of each image; -1 for images that were not looked at."""
        assert self.split is not None
        present: list[Sequence[int]] = [()] * len(self.split)
        for index in range(0, len(self.split), -(-len(self.split) // LOOKED_AT)):
            found = np.unique(decode_map(self.split.annotations[index], self.data.num_classes)).tolist()
            present[index] = [label for label in found if label != IGNORE]
        return rarest(present)

    def validation(self, index: int) -> Sample:
        """See ``View``."""
        assert self.split is not None
        image, size, labels = self._fitted(*read_pair(self.split, index, self.data.num_classes))
        truth = {"label_maps": labels}
        if self.data.scenes is not None:  # what is not background is an object
            truth["masks"] = object_image((labels > 0) & (labels != IGNORE))
        return Sample(image, size, truth)

    def picture(self, path: Path) -> Sample:
        """See ``View``; no pixel has a label."""
        picture = decode(path)
        image, size, labels = self._fitted(picture, np.full((picture.height, picture.width), IGNORE, np.uint8))
        return Sample(image, size, {"label_maps": labels})

    def answer(self, sample: Sample, device: torch.device) -> tuple[Output, Arrays]:
        """See ``View``."""
        output: Output = self.model(sample.image[None].to(device))
        found = output.logits[0].argmax(dim=0).byte()
        return output, {"prediction_maps": self._padded(found[: sample.size[0], : sample.size[1]].cpu())}

    def _fitted(
        self, picture: Image.Image, labels: NDArray[np.uint8]
    ) -> tuple[Tensor, tuple[int, int], NDArray[np.uint8]]:
        """Image [3, S, S], the size of the picture within it, and labels [S, S]."""
        image, known = self.transform(tv_tensors.Image(picture), tv_tensors.Mask(torch.from_numpy(labels)))
        height, width = image.shape[-2:]
        known = F.interpolate(known[None, None], (height, width), mode="nearest-exact")[0, 0]
        missing = (0, self.data.image_size - width, 0, self.data.image_size - height)
        return F.pad(image, missing), (height, width), self._padded(known)

    def _padded(self, labels: Tensor) -> NDArray[np.uint8]:
        """[S, S] of [h, w]."""
        missing = (0, self.data.image_size - labels.shape[1], 0, self.data.image_size - labels.shape[0])
        return F.pad(labels, missing, value=IGNORE).numpy()


def _names(data: SegDataSpec, split: Split | None) -> tuple[str, ...]:
    """Of generated images, of ADE20k's table if it lies beside the images, else the numbers that annotations have."""
    if data.scenes is not None:
        return ("background", *(f"digit_{digit}" for digit in range(CLASSES)))
    if split is not None and (table := split.root / NAMES).is_file():
        lines = table.read_text(encoding="utf-8").splitlines()[1:]
        names = tuple(line.strip().rpartition("\t")[2].partition(",")[0].strip() for line in lines if line.strip())
        if len(names) == data.num_classes:
            return names
    return tuple(f"class_{number}" for number in range(1, data.num_classes + 1))
