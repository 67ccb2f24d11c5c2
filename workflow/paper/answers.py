"""What a model answered and what is true, beside a pruning map: a class, a map of labels, or objects with boxes.

A file of maps holds one of the three kinds, named by its entry ``task``. Each kind knows its arrays, how to draw the
truth and the prediction over an image, and how much of the answer is right.

    classification  labels [n], predictions [n]: classes, -1 where there is no label
    segmentation    label_maps, prediction_maps [n, H, W] uint8: classes from 0, 255 where there is no label
    detection       predicted_* and, where the truth is known, true_*: each the m objects of all images together: image
                    [m], index of the image; boxes [m, 4]: left, top, right, bottom in pixels of the image; classes [m];
                    masks [m, H, W] bool, optional; and predicted_scores [m], between 0 and 1

For all of them, ``masks`` [n, H, W] uint8, optional: where an image's objects lie (``cropr.data.scenes``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from workflow.paper import style

IGNORE = 255
"""In maps of labels: no label here."""
SHOWN_SCORE = 0.5
"""Objects found with less confidence are not drawn."""
_UNLABELLED = (0.92, 0.92, 0.92)
_BACKGROUND, _DARK = "background", (0.2, 0.22, 0.25)
_MASK = 0.45
"""Opacity of a label or an object's mask over the image."""
_MOST = 16
"""Classes in a legend at most."""


class Answers(Protocol):
    """One kind of answers, on all images of a file."""

    panels: bool
    """Whether truth and prediction are pictures of their own, rather than a line of text below the image."""
    unit: str
    """What is right or wrong."""

    @property
    def known(self) -> bool:
        """Whether there is any truth."""

    def truth(self, axes: Axes, index: int, image: NDArray[np.uint8], classes: Sequence[str]) -> None:
        """Draw what is true of an image [H, W, 3]: over it in a panel, or below it in words."""

    def prediction(self, axes: Axes, index: int, image: NDArray[np.uint8], classes: Sequence[str]) -> None:
        """Draw what the model answered, the same way."""

    def right(self) -> float:
        """Share of the answers that are right, percent: images, pixels, or objects; NaN without truth."""

    def legend(self, classes: Sequence[str], indices: Sequence[int]) -> list[Patch]:
        """Colours of the classes that are drawn on these images, of many the most frequent; empty if none are."""


@dataclass(frozen=True)
class Classes:
    """Classification."""

    labels: NDArray[np.int64]
    """[n]; -1 where there is none (a picture of the user's)."""
    predictions: NDArray[np.int64]
    """[n]."""
    panels = False
    unit = "images"

    @property
    def known(self) -> bool:
        """Whether any image has a label."""
        return bool((self.labels >= 0).any())

    def truth(self, axes: Axes, index: int, image: NDArray[np.uint8], classes: Sequence[str]) -> None:
        """The label below the image, where there is one."""
        if self.labels[index] >= 0:
            axes.set_xlabel(class_name(classes, self.labels[index]), fontsize=9, labelpad=2)

    def prediction(self, axes: Axes, index: int, image: NDArray[np.uint8], classes: Sequence[str]) -> None:
        """The predicted class below the image, marked right or wrong where a label is known."""
        label, guess = self.labels[index], self.predictions[index]
        mark, tone = ("", style.INK) if label < 0 else (" ✓", "#00694d") if label == guess else (" ✗", "#b3420a")
        axes.set_xlabel(f"{class_name(classes, guess)}{mark}", fontsize=9, color=tone, labelpad=2)

    def right(self) -> float:
        """Share of the images with a label."""
        known = self.labels >= 0
        return 100 * float((self.predictions == self.labels)[known].mean()) if known.any() else float("nan")

    def legend(self, classes: Sequence[str], indices: Sequence[int]) -> list[Patch]:
        """None: classes are written out."""
        return []


@dataclass(frozen=True)
class LabelMaps:
    """Semantic segmentation."""

    labels: NDArray[np.uint8]
    """[n, H, W]; ``IGNORE`` where there is none."""
    predictions: NDArray[np.uint8]
    """[n, H, W]."""
    panels = True
    unit = "labelled pixels"

    @property
    def known(self) -> bool:
        """Whether any pixel has a label."""
        return bool((self.labels != IGNORE).any())

    def truth(self, axes: Axes, index: int, image: NDArray[np.uint8], classes: Sequence[str]) -> None:
        """Every pixel in the colour of its label, grey where there is none."""
        axes.imshow(painted(self.labels[index], classes), interpolation="nearest")

    def prediction(self, axes: Axes, index: int, image: NDArray[np.uint8], classes: Sequence[str]) -> None:
        """Every pixel in the colour of its predicted class, and below the share of labelled pixels that are right."""
        axes.imshow(painted(self.predictions[index], classes), interpolation="nearest")
        share = _share(self.labels[index], self.predictions[index])
        if not np.isnan(share):
            axes.set_xlabel(f"{share:.0f} % right", fontsize=9, labelpad=2)

    def right(self) -> float:
        """Share of the labelled pixels."""
        return _share(self.labels, self.predictions)

    def legend(self, classes: Sequence[str], indices: Sequence[int]) -> list[Patch]:
        """Classes of labels and predictions, by pixels."""
        chosen = list(indices)
        pixels = np.concatenate((self.labels[chosen].ravel(), self.predictions[chosen].ravel()))
        counts = np.bincount(pixels[pixels != IGNORE], minlength=1)
        return _patches(counts, classes)


@dataclass(frozen=True)
class Objects:
    """Objects of all images together."""

    image: NDArray[np.int64]
    """[m]: index of the image."""
    boxes: NDArray[np.floating[Any]]
    """[m, 4]: left, top, right, bottom in pixels."""
    classes: NDArray[np.int64]
    """[m]."""
    masks: NDArray[np.bool_] | None = None
    """[m, H, W]."""
    scores: NDArray[np.floating[Any]] | None = None
    """[m]; None for the truth."""

    def of(self, index: int) -> NDArray[np.intp]:
        """Objects of an image, the surest last, without those that are less sure than ``SHOWN_SCORE``."""
        chosen = self.image == index
        if self.scores is None:
            return np.flatnonzero(chosen)
        found = np.flatnonzero(chosen & (self.scores >= SHOWN_SCORE))
        return found[np.argsort(self.scores[found], kind="stable")]

    def draw(self, axes: Axes, index: int, image: NDArray[np.uint8], classes: Sequence[str]) -> None:
        """The image with masks tinted, boxes outlined, and class and confidence at the box."""
        axes.imshow(image, interpolation="nearest")
        tints = palette(classes) or [_DARK]  # objects of a file without names
        for number in self.of(index):
            tint = tints[int(self.classes[number]) % len(tints)]
            if self.masks is not None:
                shade = np.zeros((*self.masks[number].shape, 4))
                shade[self.masks[number]] = (*tint, _MASK)
                axes.imshow(shade, interpolation="nearest")
            left, top, right, bottom = self.boxes[number]
            # Pixels are centred on whole numbers, so that the image starts at -0.5.
            corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
            axes.add_patch(Rectangle(corner, *size, fill=False, ec="white", lw=2.4))
            axes.add_patch(Rectangle(corner, *size, fill=False, ec=tint, lw=1.4))
            name = class_name(classes, self.classes[number])
            _tag(
                axes,
                self.boxes[number],
                image,
                name if self.scores is None else f"{name} {self.scores[number]:.2f}",
                tint,
            )


@dataclass(frozen=True)
class Detections:
    """Detection and instance segmentation."""

    predicted: Objects
    true: Objects | None
    """None where nothing is known (pictures of the user's)."""
    panels = True
    unit = "objects"

    @property
    def known(self) -> bool:
        """Whether the objects are known; there may be none."""
        return self.true is not None

    def truth(self, axes: Axes, index: int, image: NDArray[np.uint8], classes: Sequence[str]) -> None:
        """The labelled objects."""
        if self.true is not None:
            self.true.draw(axes, index, image, classes)
            axes.set_xlabel(_count(len(self.true.of(index)), "object"), fontsize=9, labelpad=2)

    def prediction(self, axes: Axes, index: int, image: NDArray[np.uint8], classes: Sequence[str]) -> None:
        """The objects that were found with confidence, and how many of the true ones are among them."""
        self.predicted.draw(axes, index, image, classes)
        hits = self._matched(index)
        found = f"found {sum(hits)} of {len(hits)}" if self.known else _count(len(self.predicted.of(index)), "object")
        axes.set_xlabel(found, fontsize=9, labelpad=2)

    def right(self) -> float:
        """Share of the true objects that a box of the same class covers with IoU 0.5 or more."""
        images = [] if self.true is None else sorted(set(self.true.image.tolist()))
        matched = [hit for index in images for hit in self._matched(index)]
        return 100 * sum(matched) / len(matched) if matched else float("nan")

    def legend(self, classes: Sequence[str], indices: Sequence[int]) -> list[Patch]:
        """None: classes are written at the boxes."""
        return []

    def _matched(self, index: int) -> list[bool]:
        """For every true object of an image, whether it was found. A box finds one object at most, the surest first."""
        if self.true is None:
            return []
        free = list(self.predicted.of(index))[::-1]
        hits = []
        for number in self.true.of(index):
            fits = [
                other
                for other in free
                if self.predicted.classes[other] == self.true.classes[number]
                and box_iou(self.true.boxes[number], self.predicted.boxes[other]) >= 0.5
            ]
            if fits:
                free.remove(fits[0])
            hits.append(bool(fits))
        return hits


ARRAYS = {
    "classification": ("labels", "predictions"),
    "segmentation": ("label_maps", "prediction_maps"),
    "detection": ("predicted_image", "predicted_boxes", "predicted_classes", "predicted_scores"),
}
"""Arrays that a file of each task must have beside those of every file."""


def read_answers(task: str, arrays: Mapping[str, NDArray[Any]], names: Sequence[str]) -> Answers:
    """The answers of a file whose ``ARRAYS`` are known to be there.

    Args:
        task: key of ``ARRAYS``.
        arrays: of the file.
        names: of the classes.

    Raises:
        ValueError: objects whose arrays differ in length, or a label map with a class that has no name.
    """
    if task == "classification":
        return Classes(arrays["labels"], arrays["predictions"])
    if task == "segmentation":
        answers = LabelMaps(arrays["label_maps"], arrays["prediction_maps"])
        for labels in (answers.labels, answers.predictions):
            if (highest := int(labels[labels != IGNORE].max(initial=0))) >= len(names):
                raise ValueError(f"class {highest}, but names of {len(names)} classes; make the file again")
        return answers
    predicted = _objects("predicted", arrays)
    assert predicted is not None
    return Detections(predicted, _objects("true", arrays))


def _objects(side: str, arrays: Mapping[str, NDArray[Any]]) -> Objects | None:
    """One side's objects; None where the file has none of its arrays."""
    parts = ("image", "boxes", "classes", "masks", "scores")
    found = {part: arrays[f"{side}_{part}"] for part in parts if f"{side}_{part}" in arrays}
    if not found:
        return None
    if missing := [part for part in parts[:3] if part not in found]:
        raise ValueError(f"array '{side}_{missing[0]}' is missing; make the file again")
    if len({len(array) for array in found.values()}) > 1:
        lengths = ", ".join(f"{side}_{name}: {len(array)}" for name, array in found.items())
        raise ValueError(f"arrays of objects differ in length: {lengths}; make the file again")
    return Objects(**found)


def palette(classes: Sequence[str]) -> list[tuple[float, float, float]]:
    """A colour for each class: distinct ones as far as they go, then evenly spaced hues, neighbours kept apart.

    What is called background is dark: it fills most of a map and should not stand out.
    """
    count = sum(name != _BACKGROUND for name in classes)
    if count <= 10:
        tints = list(sns.color_palette("colorblind", count))
    else:
        hues = sns.husl_palette(count, s=0.85, l=0.62)
        step = next(n for n in range(max(2, int(count * 0.382)), count + 1) if np.gcd(n, count) == 1)
        tints = [hues[index * step % count] for index in range(count)]
    return [_DARK if name == _BACKGROUND else tints.pop(0) for name in classes]


def painted(labels: NDArray[np.uint8], classes: Sequence[str]) -> NDArray[np.floating[Any]]:
    """[H, W, 3] colours of a map of labels [H, W]; light grey without label."""
    tints = np.array([*palette(classes), _UNLABELLED])
    return tints[np.where(labels == IGNORE, len(tints) - 1, labels)]


def box_iou(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> float:
    """Intersection over union of two boxes [4]."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    return shared / (float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - shared)


def class_name(classes: Sequence[str], index: int | np.integer[Any]) -> str:
    """A class in words; its number where it has no name."""
    text = classes[int(index)] if 0 <= index < len(classes) else f"class {index}"
    return text.replace("_", " ")


def _share(labels: NDArray[np.uint8], predictions: NDArray[np.uint8]) -> float:
    known = labels != IGNORE
    return 100 * float((labels == predictions)[known].mean()) if known.any() else float("nan")


def _patches(counts: NDArray[np.int64], classes: Sequence[str]) -> list[Patch]:
    tints = palette(classes)
    most = [index for index in np.argsort(-counts, kind="stable") if counts[index]][:_MOST]
    return [Patch(color=tints[index], label=class_name(classes, index)) for index in sorted(most)]


def _tag(
    axes: Axes, box: NDArray[np.floating[Any]], image: NDArray[np.uint8], text: str, tint: tuple[float, float, float]
) -> None:
    """Text on a label in the box's colour: above the box, or at its upper edge where the image ends; right-aligned in
    the image's right half, so that it stays within."""
    height, width = image.shape[:2]
    left, top, right, _ = np.clip(box, 0, (width, height, width, height)) - 0.5
    on_right = left + right > width
    inside = top < 0.12 * height
    dark = np.dot(tint, (0.299, 0.587, 0.114)) < 0.55
    axes.text(
        right if on_right else left, top, text, color="white" if dark else style.INK, fontsize=7, fontweight="bold",
        ha="right" if on_right else "left", va="top" if inside else "bottom", clip_on=True,
        bbox={"facecolor": tint, "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
