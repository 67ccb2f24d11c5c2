"""Box and mask AP by pycocotools, and predictions as COCO's result file, which can also be scored alone:
``python -m cropr evaluate --predictions FILE --annotations FILE``."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, clip_boxes_to_image

from cropr.data.annotations import Annotations, is_number, read_annotations, read_content, wrong_box, wrong_runs
from cropr.data.coco import Target
from cropr.data.loading import some
from cropr.records import write_text
from cropr.tasks.base import DEFAULT, Evaluation, EvaluationSettings, autocast
from cropr.tasks.detection import FIGURES
from cropr.tasks.detection.cascade import Detections
from cropr.tasks.detection.model import Detector

KINDS = {"bbox": ("bbox", "box"), "segmentation": ("segm", "mask")}
"""Key of a result -> pycocotools' name of the evaluation that needs it, first word of our metrics."""

Result = dict[str, Any]
"""One detection in COCO's format: ``image_id``, ``category_id``, ``score``, ``bbox`` [left, top, width, height] in
pixels of the file, ``segmentation`` as RLE."""


@torch.no_grad()
def evaluate(
    model: Detector,
    batches: Iterable[tuple[Tensor, list[Target]]],
    annotations: Annotations,
    settings: EvaluationSettings = DEFAULT,
) -> Evaluation:
    """The metrics of ``score``, and ``val_images``. Writes ``settings.predictions`` if that is given. ``batches`` are
    as ``cropr.data.coco`` collates them; with several processes, each has its own part. The model, on the device of the
    settings, keeps its mode. Raises ValueError: there are no images."""
    training, world, device = model.training, settings.world, settings.world.device
    model.eval()
    torch.manual_seed(settings.seed)
    results, image_ids = list[Result](), list[int]()
    for images, targets in batches:
        with autocast(device, settings.precision):
            found = model.detect(images.to(device, non_blocking=True), [target["size"] for target in targets])
        for detections, target in zip(found, targets, strict=True):
            results += to_results(detections, target, annotations.category_ids)
            image_ids.append(target["image_id"])
    model.train(training)
    results, image_ids = world.gather(results), sorted(world.gather(image_ids))
    results.sort(key=lambda result: result["image_id"])  # ties must not depend on the order of the processes
    if not image_ids:
        raise ValueError("no image to evaluate: the validation set is empty")
    if settings.predictions:
        write_text(settings.predictions, json.dumps(results, allow_nan=False) + "\n")
    arrays: dict[str, Any] = {"image": np.array(image_ids)}
    metrics = score(results, annotations.path, image_ids, images=arrays)
    return Evaluation({**metrics, "val_images": len(image_ids)}, images=arrays)


def to_results(detections: Detections, target: Target, category_ids: Sequence[int]) -> list[Result]:
    """Detections of a padded image in COCO's format, in pixels of its file, without boxes that have no area within it.
    ``category_ids``: category of label k + 1 at position k."""
    (height, width), size = target["size"], target["original_size"]
    scale = torch.tensor([size[1] / width, size[0] / height]).repeat(2)
    boxes = clip_boxes_to_image(detections.boxes.float().cpu() * scale, size)
    there = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, labels, scores, masks = (x.cpu()[there] for x in (boxes, *detections[1:]))
    columns = (x.tolist() for x in (box_convert(boxes.double(), "xyxy", "xywh"), labels, scores.float()))
    return [
        {
            "image_id": target["image_id"],
            "category_id": category_ids[label - 1],
            "bbox": [round(side, 3) for side in box],
            "score": value,
            "segmentation": code,
        }
        for box, label, value, code in zip(*columns, encode_masks(masks, boxes, size), strict=True)
    ]


def score_file(predictions: Path, annotations: Path) -> dict[str, float]:
    """Score a result file against the truth, over all images of the latter. Raises FileNotFoundError, ValueError: a
    file is missing or wrong; invalid detections are listed with their position."""
    try:
        results = json.loads(predictions.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{predictions}: no such file; COCO's results belong there") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{predictions}: not JSON: {error}") from None
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        kind = "annotations" if isinstance(results, dict) and "annotations" in results else "something else"
        raise ValueError(f"{predictions}: holds {kind}, not a list of detections (image_id, category_id, score, ...)")
    return score(results, annotations, source=str(predictions))


def score(
    results: Sequence[Result],
    annotations: Path,
    image_ids: Sequence[int] | None = None,
    source: str = "results",
    images: dict[str, Any] | None = None,
) -> dict[str, float]:
    """The ``FIGURES`` in percent for boxes (``box_ap``, ...), and for masks (``mask_ap``, ...) if results have them.

    Without any detection all figures are 0, for boxes and masks. A figure is left out if the truth has no object of
    that size (pycocotools gives -1). Evaluated are the images of ``image_ids``, or all of the file; ``images``, if
    given, gets what ``matches`` finds for boxes (``box_image``, ...) and masks; ``source`` names the results in
    messages. Raises FileNotFoundError, ValueError: truth or results are missing or wrong.
    """
    truth, problems = _truth(annotations), list[str]()
    for position, result in enumerate(results):
        if wrong := _wrong(result, truth):
            problems.append(f"{source}: detection {position}: {wrong}")
        elif KINDS.keys() & result.keys() != KINDS.keys() & results[0].keys():
            problems.append(f"{source}: detection {position}: has {sorted(result)}, the first one {sorted(results[0])}")
    if problems:
        raise ValueError(some(problems, "\n  "))
    metrics: dict[str, float] = {}
    for key, (kind, name) in KINDS.items():
        if results and key not in results[0]:
            continue
        # One key alone: with a box as well, pycocotools would take the box's area for the mask's.
        entries = [{k: result[k] for k in ("image_id", "category_id", "score", key)} for result in results]
        evaluation = _evaluation(truth, entries, kind, image_ids)
        if images is not None:
            images |= {f"{name}_{part}": array for part, array in matches(evaluation).items()}
        values = zip(FIGURES, evaluation.stats, strict=True)
        metrics |= {f"{name}_{figure}": 100 * float(value) for figure, value in values if value >= 0}
    return metrics


def _truth(path: Path) -> COCO:
    """The truth in a form that pycocotools evaluates correctly. Annotations are numbered from 1, because it reads
    number 0 as "no match". Objects without a polygon of three points get an empty mask, because it fails on an empty
    list and reads four numbers as a box."""
    content = read_content(path)
    _, problems = read_annotations(path, content)
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


def _wrong(result: Mapping[str, Any], truth: COCO) -> str | None:
    """What is wrong with a detection, None if it is valid."""
    if type(image := result.get("image_id")) is not int or image not in truth.imgs:
        return f"image_id {image!r} is not among the images of the annotations"
    if type(category := result.get("category_id")) is not int or category not in truth.cats:
        return f"category_id {category!r} is not among the categories {sorted(truth.cats)}"
    if not is_number(result.get("score")):
        return f"score is {result.get('score')!r}, not a number"
    if "bbox" not in result and "segmentation" not in result:
        return "has neither bbox nor segmentation"
    if "bbox" in result and (wrong := wrong_box(result["bbox"])):
        return wrong
    if "segmentation" in result:
        code, listed = result["segmentation"], truth.imgs[image]
        if not isinstance(code, dict) or not isinstance(code.get("counts"), str):
            return "segmentation is not compressed RLE (size, counts)"
        if code.get("size") != [listed["height"], listed["width"]]:
            return f"segmentation has size {code.get('size')}, its image {[listed['height'], listed['width']]}"
        return wrong_runs(code["counts"], code["size"])
    return None


def _evaluation(truth: COCO, results: list[Result], kind: str, image_ids: Sequence[int] | None) -> COCOeval:
    """pycocotools' evaluation with its statistics, without its prints."""
    with redirect_stdout(io.StringIO()):
        # loadRes fails on an empty list.
        found = truth.loadRes(results) if results else _coco({**truth.dataset, "annotations": []})
        evaluation = COCOeval(truth, found, kind)
        if image_ids is not None:
            evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def matches(evaluation: COCOeval) -> dict[str, Any]:
    """What AP at area ``all`` is computed from. For each detection, at most 100 an image and category: ``image`` and
    ``category``, places among the sorted ids; ``score``; ``hit`` and ``ignored``, [detections, IoU thresholds] bool.
    And ``objects`` [images, categories], without those that need not be found (crowds)."""
    settings = evaluation.params
    images, categories, most = len(settings.imgIds), len(settings.catIds), settings.maxDets[-1]
    objects = np.zeros((images, categories), np.int32)
    none, number = np.zeros((0, len(settings.iouThrs)), bool), np.zeros(0, np.int32)
    rows: list[tuple[Any, ...]] = [(number, number, np.zeros(0), none, none)]
    # pycocotools lists its results by category, area and image; area 0 is ``all``.
    by_area = np.array(evaluation.evalImgs, dtype=object).reshape(categories, len(settings.areaRng), images)
    for (category, image), own in np.ndenumerate(by_area[:, 0]):
        if own is None:  # neither objects nor detections
            continue
        objects[image, category] = np.sum(own["gtIgnore"] == 0)
        scores = np.array(own["dtScores"][:most], float)
        places = (np.full(len(scores), place, np.int32) for place in (image, category))
        rows.append((*places, scores, *(own[key][:, :most].T > 0 for key in ("dtMatches", "dtIgnore"))))
    columns = map(np.concatenate, zip(*rows, strict=True))
    return {"objects": objects, **dict(zip(("image", "category", "score", "hit", "ignored"), columns, strict=True))}


def encode_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Run-length codes, in COCO's JSON form, of masks [M, s, s], probabilities within boxes [M, 4] (left, top, right,
    bottom in pixels) of an image of ``size`` height and width.

    A pixel belongs to the object if the mask, interpolated at its centre, is at least 0.5; outside of the box the mask
    is 0, which rounds corners, as in detectron2. torchvision's ``paste_masks_in_image`` rounds boxes to whole pixels,
    which costs accuracy on small objects, and takes 0.9 GB for 100 masks at 1536 pixels.
    """
    canvas = np.zeros(size, np.uint8, order="F")
    codes = []
    for mask, box in zip(masks.float().cpu(), boxes.float().cpu(), strict=True):
        # Pixels whose centre lies in the box, and at most one more at each side.
        left, top = box[:2].floor().clamp(min=0).int().tolist()
        right, bottom = box[2:].ceil().clamp(min=0).int().tolist()
        rows, columns = range(size[0])[top:bottom], range(size[1])[left:right]
        region = np.s_[rows.start : rows.stop, columns.start : columns.stop]
        if rows and columns:
            canvas[region] = _paste(mask, box, rows, columns)
        code = coco_mask.encode(canvas)
        canvas[region] = 0
        codes.append({"size": list(size), "counts": code["counts"].decode()})
    return codes


def _paste(mask: Tensor, box: Tensor, rows: range, columns: range) -> np.ndarray:
    """Where a mask [s, s] in its box [4] is at least 0.5 at the centres of pixels, [rows, columns]; bilinear."""
    y, x = (
        (torch.arange(pixels.start, pixels.stop) + 0.5 - box[axis]) / (box[axis + 2] - box[axis]) * 2 - 1
        for axis, pixels in ((1, rows), (0, columns))
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0].ge(0.5).numpy()
