"""Box and mask AP by pycocotools, and predictions as COCO's result file.

    results, _ = predict(model, batches, split.annotations.category_ids)
    write_results(Path("predictions.json"), results)
    metrics = score(results, split.annotations.path)

A result file can be scored alone: ``python -m cropr evaluate --predictions FILE --annotations FILE``.

All twelve figures of pycocotools come for boxes and for masks: ``box_ap``, ``mask_ap50`` and so on, in percent. One for
which the truth has no object, of that size or at all, is left out (pycocotools gives -1).
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from cropr.data.annotations import Annotations, parse, read_content
from cropr.data.coco import Target
from cropr.data.loading import some
from cropr.records import write_text
from cropr.tasks.base import Evaluation, EvaluationSettings, autocast
from cropr.tasks.detection.cascade import Detections
from cropr.tasks.detection.masks import encode_masks, mean_inside

KINDS = {"bbox": ("box", "bbox"), "segm": ("mask", "segmentation")}
"""pycocotools' name of an evaluation -> beginning of our metrics, key of a result that it needs."""

FIGURES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)
"""pycocotools' twelve, in its order. AP: mean over IoU .50 to .95; AR: recall with 1, 10, 100 detections an image (and
category); small below 32^2 pixels of area, large above 96^2."""

_ALONE = EvaluationSettings()

Result = dict[str, Any]
"""One detection in COCO's format: ``image_id``, ``category_id``, ``score``, ``bbox`` [left, top, width, height] in
pixels of the file, ``segmentation`` as RLE."""


class CanDetect(Protocol):
    """What evaluation asks of a model."""

    training: bool

    def eval(self) -> Any:
        """To inference mode."""

    def train(self, mode: bool = True) -> Any:
        """Back again."""

    def detect(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Detections in images [B, 3, S, S], whose parts outside of ``sizes`` (height, width) are padding."""


class Predictions(NamedTuple):
    """Of all processes."""

    results: list[Result]
    """By image."""
    image_ids: list[int]
    """Images that were looked at; some may have no result."""


def evaluate(
    model: CanDetect,
    batches: Iterable[tuple[Tensor, list[Target]]],
    annotations: Annotations,
    settings: EvaluationSettings = _ALONE,
    maskness: bool = False,
) -> Evaluation:
    """Box and mask AP of a detector; its mode is left as it was. Writes ``settings.predictions`` if that is given.

    Args:
        model: on the device of the settings.
        batches: as ``cropr.data.coco`` collates them; with several processes, each has its own part.
        annotations: the truth.
        maskness: as for ``to_results``.

    Returns:
        The metrics of ``score``, and ``val_images``.

    Raises:
        ValueError: there are no images.
    """
    results, image_ids = predict(model, batches, annotations.category_ids, settings, maskness)
    if not image_ids:
        raise ValueError("no image to evaluate: the validation set is empty")
    if settings.predictions:
        write_results(settings.predictions, results)
    return Evaluation({**score(results, annotations.path, image_ids), "val_images": len(image_ids)})


@torch.no_grad()
def predict(
    model: CanDetect,
    batches: Iterable[tuple[Tensor, list[Target]]],
    category_ids: Sequence[int],
    settings: EvaluationSettings = _ALONE,
    maskness: bool = False,
) -> Predictions:
    """All detections in COCO's format; arguments as for ``evaluate``.

    Args:
        category_ids: category of label k + 1 at position k.
    """
    training = model.training
    model.eval()
    torch.manual_seed(settings.seed)
    results: list[Result] = []
    image_ids = []
    for images, targets in batches:
        with autocast(settings.device, settings.precision):
            found = model.detect(images.to(settings.device, non_blocking=True), [target["size"] for target in targets])
        for detections, target in zip(found, targets, strict=True):
            results += to_results(detections, target, category_ids, maskness)
            image_ids.append(target["image_id"])
    model.train(training)
    results, image_ids = settings.gather(results), settings.gather(image_ids)
    results.sort(key=lambda result: result["image_id"])  # the order of the processes must not decide between ties
    return Predictions(results, sorted(image_ids))


def to_results(
    detections: Detections, target: Target, category_ids: Sequence[int], maskness: bool = False
) -> list[Result]:
    """Detections of an image in COCO's format, in pixels of its file; boxes without area within it are dropped.

    Args:
        detections: of the padded image.
        target: ``image_id``, ``size`` and ``original_size``.
        category_ids: category of label k + 1 at position k.
        maskness: write ``mask_score``, the score times the mask's mean probability, which then ranks masks.
    """
    (height, width), (rows, columns) = target["size"], target["original_size"]
    boxes = detections.boxes.float().cpu()
    boxes = boxes * boxes.new_tensor([columns / width, rows / height, columns / width, rows / height])
    boxes = clip_boxes_to_image(boxes, (rows, columns))
    there = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores, labels = boxes[there], detections.scores.float().cpu()[there], detections.labels.cpu()[there]
    results: list[Result] = [
        {
            "image_id": target["image_id"],
            "category_id": category_ids[label - 1],
            "bbox": [round(value, 3) for value in (left, top, right - left, bottom - top)],
            "score": value,
        }
        for (left, top, right, bottom), value, label in zip(
            boxes.tolist(), scores.tolist(), labels.tolist(), strict=True
        )
    ]
    masks = detections.masks.float().cpu()[there]
    for result, code in zip(results, encode_masks(masks, boxes, (rows, columns)), strict=True):
        result["segmentation"] = code
    if maskness:
        for result, value in zip(results, (scores * mean_inside(masks)).tolist(), strict=True):
            result["mask_score"] = value
    return results


# Files --------------------------------------------------------------------------------------------------------------


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write COCO's result file, whole or not at all."""
    write_text(path, json.dumps(list(results), allow_nan=False) + "\n")


def read_results(path: Path) -> list[Result]:
    """A result file, not compared with any truth yet.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not a list of detections.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; it should hold detections in COCO's result format") from None
    try:
        results = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        kind = "annotations" if isinstance(results, dict) and "annotations" in results else "something else"
        raise ValueError(f"{path}: holds {kind}, not a list of detections (image_id, category_id, score, bbox, ...)")
    return results


def score_file(predictions: Path, annotations: Path) -> dict[str, float]:
    """Score a result file against the truth, over all images of the latter.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or wrong; findings are listed with their position.
    """
    results = read_results(predictions)
    return score(results, annotations, source=str(predictions))


def score(
    results: Sequence[Result],
    annotations: Path,
    image_ids: Sequence[int] | None = None,
    source: str = "results",
) -> dict[str, float]:
    """Twelve figures of pycocotools for boxes (``box_ap``, ...), and for masks (``mask_ap``, ...) if results have them.

    Without any detection all figures are 0, boxes' and masks'.

    Args:
        results: detections in COCO's format; they are not changed.
        annotations: file with the truth.
        image_ids: images to evaluate; None for all of the file.
        source: where the results come from, for messages.

    Raises:
        FileNotFoundError, ValueError: truth or results that are missing or wrong.
    """
    truth = _truth(annotations)
    _require_valid(results, truth, source)
    metrics = {}
    for kind, (name, key) in KINDS.items():
        if not results or key in results[0]:
            for figure, value in zip(FIGURES, _figures(truth, results, kind, image_ids), strict=True):
                if value >= 0:
                    metrics[f"{name}_{figure}"] = 100 * float(value)
    return metrics


def _truth(path: Path) -> COCO:
    """The truth as pycocotools wants it.

    It takes a match with annotation 0 for none, so that annotations are numbered from 1; and it cannot read an empty
    list of polygons, nor one of four numbers other than as a box: such an object has an empty mask here.
    """
    content = read_content(path)
    _, problems = parse(path, content)
    if problems:
        raise ValueError(some(problems, "\n  "))
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation["id"] = number
        if isinstance(annotation["segmentation"], list):
            polygons = [polygon for polygon in annotation["segmentation"] if len(polygon) >= 6]
            height, width = sizes[annotation["image_id"]]
            annotation["segmentation"] = polygons or {"size": [height, width], "counts": [height * width]}
    return _coco(content)


def _coco(content: dict[str, Any]) -> COCO:
    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
    return coco


def _require_valid(results: Sequence[Result], truth: COCO, source: str) -> None:
    keys = [key for _, key in KINDS.values()]
    problems = []
    for position, result in enumerate(results):
        if wrong := _wrong(result, truth):
            problems.append(f"{source}: detection {position}: {wrong}")
        elif [key in result for key in keys] != [key in results[0] for key in keys]:
            problems.append(f"{source}: detection {position}: has {sorted(result)}, the first one {sorted(results[0])}")
    if problems:
        raise ValueError(some(problems, "\n  "))


def _wrong(result: Mapping[str, Any], truth: COCO) -> str | None:
    """What is wrong with a detection, None if nothing is."""
    if (image := result.get("image_id")) not in truth.imgs:
        return f"image_id {image!r} is not among the images of the annotations"
    if (category := result.get("category_id")) not in truth.cats:
        return f"category_id {category!r} is not among the categories {sorted(truth.cats)}"
    if not _finite([result.get("score")]):
        return f"score is {result.get('score')!r}, not a number"
    if "bbox" not in result and "segmentation" not in result:
        return "has neither bbox nor segmentation"
    if "bbox" in result and not (isinstance(box := result["bbox"], list) and len(box) == 4 and _finite(box)):
        return f"bbox is {box!r}, not four numbers (left, top, width, height)"
    if "segmentation" in result:
        code, listed = result["segmentation"], truth.imgs[image]
        if not isinstance(code, dict) or not isinstance(code.get("counts"), str):
            return "segmentation is not compressed RLE (size, counts)"
        if code.get("size") != [listed["height"], listed["width"]]:
            return f"segmentation has size {code.get('size')}, its image {[listed['height'], listed['width']]}"
    return None


def _finite(values: Iterable[Any]) -> bool:
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )


def _figures(truth: COCO, results: Sequence[Result], kind: str, image_ids: Sequence[int] | None) -> Sequence[float]:
    """pycocotools' statistics, without its prints."""
    with redirect_stdout(io.StringIO()):
        if results:
            found = truth.loadRes([_entry(result, kind) for result in results])
        else:  # loadRes looks at the first result
            found = _coco({**truth.dataset, "annotations": []})
        evaluation = COCOeval(truth, found, kind)
        if image_ids is not None:
            evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def _entry(result: Result, kind: str) -> Result:
    """A copy with what one evaluation needs: beside a box, pycocotools would take the box's area for the mask's."""
    entry = {"image_id": result["image_id"], "category_id": result["category_id"], "score": result["score"]}
    if kind == "bbox":
        return entry | {"bbox": result["bbox"]}
    return entry | {"segmentation": result["segmentation"], "score": result.get("mask_score", result["score"])}
