"""Detection in COCO 2017's layout: ``train2017/``, ``val2017/`` and ``annotations/instances_{train,val}2017.json``.

Images [B, 3, S, S] are normalised and padded with zeros on the right and at the bottom. Targets are a list of
dictionaries, one an image of n instances, with torchvision's keys and conventions:

    boxes [n, 4] float32: left, top, right, bottom in pixels of the padded image
    labels [n] int64: 1 for the category of lowest id, and so on without gaps; 0 is the background
    masks [n, S, S] uint8: 1 on the object
    image_id: int, of the annotation file
    size, original_size: (height, width) of the image within the padding, and of its file
    seed: int, of what the detector draws for this image

Evaluation has the id and the sizes alone: the truth is read by pycocotools (``cropr.tasks.detection.evaluation``).
Training leaves out images without an instance (``cropr.data.annotations``), as the reference recipe does.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cropr.data.annotations import Annotations, CocoImage, Instance, read_annotations
from cropr.data.loading import ImageError, Samples, decode, pad, require_folders, settle, standardise, wrong_count
from cropr.tasks.detection import TASK, DetDataSpec


class Target(TypedDict, total=False):
    """See the head of this file."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    image_id: int
    size: tuple[int, int]
    original_size: tuple[int, int]
    seed: int


@dataclass(frozen=True, slots=True)
class CocoSplit:
    """Images of one split and what is known of them."""

    root: Path
    name: str
    annotations: Annotations
    images: tuple[CocoImage, ...]

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> Path:
        return self.root / f"{self.name}2017" / self.images[index].file

    def instances(self, index: int) -> list[Instance]:
        """Of an image; neither crowd regions nor what is skipped."""
        return self.annotations.instances[self.images[index].id]


def load_coco(
    root: str | Path, num_classes: int | None = None, problems: list[str] | None = None
) -> tuple[CocoSplit, CocoSplit]:
    """Read the annotations of both splits; nothing is decoded. What is wrong joins ``problems``, if that is given.
    Raises FileNotFoundError: the root, a folder or an annotation file is missing; ValueError: what ``read_annotations``
    finds, images without a file, other categories in the splits or another number of them than ``num_classes``."""
    root, findings, splits = Path(root), list[str](), []
    require_folders(root, TASK)
    for name in ("train", "val"):
        annotations, wrong = read_annotations(root / "annotations" / f"instances_{name}2017.json")
        splits.append(CocoSplit(root, name, annotations, annotations.images))
        findings += wrong + _missing_files(splits[-1])
    train, val = (split.annotations for split in splits)
    if not findings and train.categories != val.categories:
        findings.append(f"{train.path} and {val.path} have different categories")
    if not findings:
        findings += wrong_count(f"{train.path}", len(train.categories), "categories", num_classes)
    return settle((splits[0], splits[1]), findings, problems)


def _missing_files(split: CocoSplit) -> list[str]:
    """One listing instead of a look at every file; what it lacks may still lie in a folder below."""
    there = {entry.name for entry in (split.root / f"{split.name}2017").iterdir()}
    absent = [i for i, image in enumerate(split.images) if image.file not in there and not split.path(i).is_file()]
    listed = f"no such file; {split.annotations.path} lists it as image"
    return [f"{split.path(index)}: {listed} {split.images[index].id}" for index in absent]


def fingerprint(splits: Iterable[CocoSplit]) -> str:
    """Digest of the annotation files, which name the images."""
    digests = (hashlib.sha256(split.annotations.path.read_bytes()).digest() for split in splits)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def read_image(split: CocoSplit, index: int) -> tv_tensors.Image:
    """uint8 [3, H, W]. ImageError: it cannot be read, or has another size than its annotation says."""
    listed, path = split.images[index], split.path(index)
    image = F.to_image(decode(path))
    if (found := tuple(image.shape[-2:])) != (listed.height, listed.width):
        says = f"{split.annotations.path} says {listed.width} x {listed.height} of image {listed.id}"
        raise ImageError(f"{path}: is {found[1]} x {found[0]} px; {says}")
    return image


def read_masks(split: CocoSplit, index: int) -> tv_tensors.Mask:
    """uint8 [n, H, W] of the instances of an image. ImageError: a segmentation cannot be decoded."""
    image = split.images[index]
    masks = np.zeros((split.annotations.instances.count(image.id), image.height, image.width), np.uint8)
    for mask, instance in zip(masks, split.instances(index), strict=True):
        code: Any = instance.segmentation
        try:
            if isinstance(code, list) or isinstance(code["counts"], list):  # polygons, or run lengths
                code = coco_mask.frPyObjects(code, image.height, image.width)
            mask[:] = coco_mask.decode(coco_mask.merge(code) if isinstance(code, list) else code)
        except Exception as error:  # its C code raises what it likes
            where = f"{split.annotations.path}: annotation {instance.id}"
            raise ImageError(f"{where}: its segmentation cannot be decoded: {error}") from None
    return tv_tensors.Mask(torch.from_numpy(masks))


def read_pair(split: CocoSplit, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    return read_image(split, index), read_masks(split, index)


class EvalImages(Samples):
    """Every image, its longer side resized to S, and what brings predictions back to the file's pixels."""

    layout = TASK.layout

    def sample(self, index: int) -> tuple[Tensor, Target]:
        return self._with_sizes(fit(read_image(self.split, index), self.spec.image_size), index)

    def _with_sizes(self, seen: Tensor, index: int) -> tuple[Tensor, Target]:
        """What is seen of an image, uint8 [3, h, w], as [3, S, S], and its sizes."""
        number, _, *original = self.split.images[index]
        sizes: Any = {"size": (seen.shape[-2], seen.shape[-1]), "original_size": tuple(original)}
        return normalise(seen, self.spec), {"image_id": number, **sizes}


class TrainImages(EvalImages):
    """Images with large-scale jitter, which may leave no instance. Raises ValueError: no image has an instance."""

    def __init__(self, split: CocoSplit, spec: DetDataSpec, seed: int) -> None:
        occupied = tuple(image for image in split.images if split.annotations.instances.count(image.id))
        if not occupied:
            raise ValueError(f"{split.annotations.path}: no image has an instance to train on")
        super().__init__(replace(split, images=occupied), spec, seed)

    def sample(self, index: int) -> tuple[Tensor, Target]:
        instances = self.split.instances(index)
        boxes = torch.tensor([instance.box for instance in instances], dtype=torch.float32).reshape(-1, 4)
        view = jitter(read_image(self.split, index), boxes, read_masks(self.split, index), self.spec)
        labels = torch.tensor([instance.label for instance in instances], dtype=torch.int64)[view.kept]
        image, target = self._with_sizes(view.image, index)
        seed, masks = int(torch.randint(2**62, ())), pad(view.masks, self.spec.image_size)
        return image, {"boxes": view.boxes, "labels": labels, "masks": masks, "seed": seed, **target}


def normalise(image: Tensor, spec: DetDataSpec) -> Tensor:
    """uint8 [3, h, w] -> float32 [3, S, S], padded with zeros, which is the mean colour."""
    return pad(standardise(image, spec.mean, spec.std), spec.image_size)


def collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    """Images [B, 3, S, S]; targets stay a list, since they have different numbers of instances."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), list(targets)


class View(NamedTuple):
    """What is seen of an image: image uint8 [3, h, w], boxes [m, 4] float32 (left, top, right, bottom), masks uint8
    [m, h, w], and which m of the n instances have a pixel in it, [n] bool."""

    image: Tensor
    boxes: Tensor
    masks: Tensor
    kept: Tensor


class Window(NamedTuple):
    """A part of an image, in whole pixels, and the height and width to which it is resized."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]


def jitter(image: tv_tensors.Image, boxes: Tensor, masks: tv_tensors.Mask, spec: DetDataSpec) -> View:
    """Large-scale jitter of an image uint8 [3, H, W], boxes [n, 4] float32 (left, top, right, bottom, within the image)
    and masks uint8 [n, H, W]: perhaps flipped, resized by a factor from ``spec.scale``, cropped to at most S x S. A box
    that the crop cuts is drawn anew around what is left of its mask. Always draws four numbers of torch's generator."""
    flip, scale, down, right = torch.rand(4).tolist()
    marks = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
    if flip < spec.hflip:
        image, marks, masks = F.horizontal_flip(image), F.horizontal_flip(marks), F.horizontal_flip(masks)
    low, high = spec.scale
    window = view_window(tuple(image.shape[-2:]), spec.image_size, low + scale * (high - low), (down, right))
    place = {**window._asdict(), "size": list(window.size)}
    seen = F.resized_crop_image(image.as_subclass(Tensor), **place)
    # torchvision's own choice for masks, NEAREST, takes the left upper pixel of those that fall together: at a small
    # scale masks would lie up to half a pixel to the left of and above their objects.
    parts = F.resized_crop_image(masks.as_subclass(Tensor), **place, interpolation=InterpolationMode.NEAREST_EXACT)
    kept = parts.flatten(1).any(dim=1).bool()
    ends = window.left, window.top, window.left + window.width, window.top + window.height
    beyond = (marks.as_subclass(Tensor) - torch.tensor(ends)) * torch.tensor([1, 1, -1, -1]) < 0
    cut = beyond.any(dim=1)[kept]
    fresh = F.resized_crop(marks, **place).as_subclass(Tensor)[kept]
    fresh[cut] = masks_to_boxes(parts[kept][cut]) + fresh.new_tensor([0, 0, 1, 1])
    return View(seen, fresh, parts[kept], kept)


def view_window(size: tuple[int, int], side: int, factor: float, offset: tuple[float, float]) -> Window:
    """The part of an image of ``size`` H, W that is seen, at most ``side`` pixels each way, when it is resized by
    ``factor`` (1: the longer side becomes ``side``) and then cropped, at ``offset`` in [0, 1] from top and left. The
    crop is taken from the file's pixels, then resized: the whole enlarged image would take up to a gigabyte."""
    scale = factor * side / max(size)
    starts, lengths, seen = [], [], []
    for length, where in zip(size, offset, strict=True):
        resized = max(1, round(length * scale))
        visible = min(side, resized)
        taken = max(1, round(length * visible / resized))
        starts.append(min(round(where * (resized - visible) * length / resized), length - taken))
        lengths.append(taken)
        seen.append(visible)
    return Window(starts[0], starts[1], lengths[0], lengths[1], (seen[0], seen[1]))


def fit(image: Tensor, side: int) -> Tensor:
    """uint8 [3, H, W] -> [3, h, w], the longer of which is ``side``."""
    window = view_window((image.shape[-2], image.shape[-1]), side, 1.0, (0.0, 0.0))
    return F.resize_image(image.as_subclass(Tensor), list(window.size))
