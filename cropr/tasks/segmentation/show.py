"""Label maps of single images, for pruning maps (``cropr.show``). S side of the model's window."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.utils import draw_segmentation_masks

from cropr.data.ade20k import IGNORE, decode_map, eval_view, read_pair
from cropr.data.loading import decode, pad
from cropr.pruning.model import Output
from cropr.show import Answers, Shown, class_colour, rarest, to_pixels

SAMPLE = 500
"""Annotations that are read to choose images by, evenly spaced: more would take too long for photos."""


class MapAnswers(Answers):
    """A class a pixel. An image is shrunk into one window: a pruning map belongs to one forward pass."""

    def show(self, item: int | str, device: torch.device) -> Shown:
        if self.split and isinstance(item, int):
            picture, labels = read_pair(self.split, item, self.data.num_classes)
        else:
            picture, labels = decode(str(item)), None
        known = np.zeros((picture.height, picture.width), np.uint8) if labels is None else labels
        whole = self.data.model_copy(update={"evaluation": "single"})
        image, mask = eval_view(tv_tensors.Image(picture), tv_tensors.Mask(torch.from_numpy(known)), whole)
        height, width = image.shape[-2:]
        padded = pad(image, self.data.image_size)
        output: Output = self.model(padded[None].to(device))
        pixels = to_pixels(padded, self.data.mean, self.data.std)
        found = output.logits[0, :, :height, :width].argmax(dim=0).cpu()
        true = F.interpolate(mask[None, None], (height, width), mode="nearest-exact")[0, 0]
        truth = None if labels is None else _drawn(pixels, true)
        shares = sorted(enumerate(found.flatten().bincount().tolist()), key=lambda item: -item[1])
        rows = tuple({"class": label, "share": count / found.numel()} for label, count in shares if count)
        return Shown(image=pixels, output=output, truth=truth, prediction=_drawn(pixels, found), found=rows)

    def labels(self) -> list[int]:
        """The rarest class of each image; -1 for images that are not in the sample."""
        present: list[list[int]] = [[] for _ in range(len(self.split))]
        for index in range(0, len(present), -(-len(present) // SAMPLE) or 1):
            found = np.unique(decode_map(self.split.annotations[index], self.data.num_classes)).tolist()
            present[index] = [label for label in found if label != IGNORE]
        return rarest(present)


def _drawn(pixels: Tensor, labels: Tensor) -> Tensor:
    """Labels [h, w] over the image in the window [3, S, S]; what has no label stays plain."""
    labels = pad(labels[None].byte(), pixels.shape[-1], IGNORE)[0]
    present = [label for label in labels.unique().tolist() if label != IGNORE]
    if not present:
        return pixels
    masks = torch.stack([labels == label for label in present])
    return draw_segmentation_masks(pixels, masks, alpha=0.7, colors=[class_colour(label) for label in present])
