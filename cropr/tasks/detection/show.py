"""Boxes and masks of single images, for pruning maps (``cropr.show``)."""

from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from cropr.data.coco import fit, normalise, read_image, read_masks
from cropr.data.loading import decode
from cropr.show import Answers, Shown, class_colour, rarest, to_pixels
from cropr.tasks.detection.evaluation import encode_masks
from cropr.tasks.detection.model import DetectionOutput

MIN_SCORE = 0.3
"""Objects of lower confidence are not drawn."""


class ObjectAnswers(Answers):
    """Objects with boxes and masks. An image is fitted into the square of the spec and padded to the model's canvas."""

    def labels(self) -> list[int]:
        split = self.split
        return rarest([{instance.label for instance in split.instances(index)} for index in range(len(split))])

    def show(self, item: int | str, device: torch.device) -> Shown:
        split = self.split if isinstance(item, int) else None
        file = read_image(split, int(item)) if split else v2.to_image(decode(str(item)))
        fitted = fit(file, self.data.image_size)
        size = (fitted.shape[-2], fitted.shape[-1])
        image = self._padded(normalise(fitted, self.data))
        output: DetectionOutput = self.model(image[None].to(device), sizes=[size])
        found = output.detections[0]
        sure = found.scores >= MIN_SCORE
        boxes = found.boxes[sure].float().cpu()
        canvas = self.model.canvas
        codes = encode_masks(found.masks[sure], boxes, canvas)
        masks = torch.from_numpy(np.array([coco_mask.decode(code) for code in codes], bool).reshape(-1, *canvas))
        pixels = to_pixels(image, self.data.mean, self.data.std)
        truth = None
        if split:
            whole = read_masks(split, int(item)).as_subclass(Tensor)
            true = self._padded(F.interpolate(whole[:, None], size, mode="nearest-exact")[:, 0]).bool()
            seen = true.flatten(1).any(dim=1)  # an object can vanish when an image shrinks
            classes = [instance.label for instance in split.instances(int(item))]
            truth = _drawn(pixels, masks_to_boxes(true[seen]), true[seen], torch.tensor(classes)[seen].tolist())
        classes = found.labels[sure].tolist()
        prediction = _drawn(pixels, boxes, masks, classes)
        corners = (boxes * (file.shape[-1] / size[1])).tolist()  # in pixels of the file
        rows = tuple(
            {"class": label - 1, "score": score, **dict(zip(("left", "top", "right", "bottom"), box, strict=True))}
            for label, score, box in zip(classes, found.scores[sure].tolist(), corners, strict=True)
        )
        return Shown(image=pixels, output=output.encoded, truth=truth, prediction=prediction, found=rows)

    def _padded(self, values: Tensor) -> Tensor:
        """[..., H, W]: zeros at the right and the bottom."""
        return F.pad(values, (0, self.model.canvas[1] - values.shape[-1], 0, self.model.canvas[0] - values.shape[-2]))


def _drawn(pixels: Tensor, boxes: Tensor, masks: Tensor, labels: Sequence[int]) -> Tensor:
    """An image uint8 [3, H, W] with m objects: boxes [m, 4] in pixels, masks [m, H, W] bool, classes [m]."""
    if not len(labels):
        return pixels
    colours = [class_colour(label) for label in labels]
    pixels = draw_segmentation_masks(pixels, masks, alpha=0.5, colors=colours)
    return draw_bounding_boxes(pixels, boxes, colors=colours, width=max(1, pixels.shape[-1] // 200))
