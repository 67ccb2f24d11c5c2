"""What a model answers on single images, beside what is true of them, as arrays: what pruning maps are drawn from.

    view = open_view(spec, root)                             # cropr.tasks.views
    load_weights(view.model, weights)
    output, answer = view.answer(view.validation(0), device)

The arrays have the names that ``workflow.paper.answers`` reads. H and W are the pixels that the model sees of an image,
padding included: a map of pruned patches covers all of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cropr.data.scenes import OBJECT
from cropr.pruning.model import Output, PrunedViT
from cropr.training.specs import TrainSpec

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Sample:
    """An image as a model sees it."""

    image: Tensor
    """[3, H, W], normalised; padding is 0, at the right and the bottom."""
    size: tuple[int, int]
    """Height and width of the picture within the padding."""
    truth: Arrays
    """What is known of the image, by name; see ``View.join``."""


class View(ABC):
    """A model of one task, the images to look at, and what it says of them.

    Args:
        spec: of a training run.
        root: the images, in the layout of the task; None where only pictures of the user's own are looked at.

    Raises:
        ValueError, FileNotFoundError: images that are not there, or others than the spec asks for.
    """

    model: PrunedViT
    """In training form and evaluation mode; weights are loaded from outside."""
    classes: tuple[str, ...]
    """Names; numbers, or none at all, where nobody has named them."""
    per_object: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of arrays that have an entry an object; others have one an image."""

    def __init__(self, spec: TrainSpec, root: Path | None) -> None:
        self.spec, self.root = spec, root

    @abstractmethod
    def labels(self) -> Sequence[int]:
        """The class that each validation image stands for, so that a choice can be spread; -1 for none."""

    @abstractmethod
    def validation(self, index: int) -> Sample:
        """A validation image, with its truth."""

    @abstractmethod
    def picture(self, path: Path) -> Sample:
        """A picture of the user's own, treated as a validation image is."""

    @abstractmethod
    def answer(self, sample: Sample, device: torch.device) -> tuple[Output, Arrays]:
        """What the encoder did, and what the model answers, as arrays of this image."""

    def pixels(self, sample: Sample) -> NDArray[np.uint8]:
        """uint8 [H, W, 3]: the image as the model sees it; padding has the mean colour."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.spec.data.mean, self.spec.data.std))
        levels = ((sample.image * std + mean) * 255).round().clamp(0, 255).byte()
        return levels.permute(1, 2, 0).numpy()

    def join(self, images: Sequence[Arrays]) -> Arrays:
        """Arrays of all images from those of each: what every image has, stacked. What has an entry an object is
        concatenated, and ``<beginning>image`` says to which image each belongs."""
        shared = [name for name in images[0] if all(name in image for image in images)]
        joined = {}
        for name in shared:
            values = [image[name] for image in images]
            start = next((start for start in self.per_object if name.startswith(start)), None)
            joined[name] = np.stack(values) if start is None else np.concatenate(values)
            if start is not None:
                joined[f"{start}image"] = np.repeat(np.arange(len(images)), [len(value) for value in values])
        return joined


def rarest(present: Sequence[Collection[int]]) -> list[int]:
    """For images that show several classes each: the one that the fewest of them show, -1 for those without any.

    Of classes that are equally rare, the first. So a choice that is spread over these labels shows the data's variety,
    where almost every image has a wall or a person.
    """
    counts = Counter(label for labels in present for label in set(labels))
    return [min(labels, key=lambda label: (counts[label], label), default=-1) for labels in present]


def object_image(on: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Truth mask [H, W] as generated images have it (``cropr.data.scenes``), of where objects are."""
    return np.where(on, OBJECT, 0).astype(np.uint8)
