"""Try rows and settings of the laptop scale on images that no table uses: scenes of seed 1.

    python docs/small_scale/search.py classification imagenet_methods/none imagenet_methods/random_r8_llf
    python docs/small_scale/search.py segmentation ade20k/cropr --set recipe.query_lr=1 --seed 1
    python docs/small_scale/search.py detection coco/cropr coco/random --set recipe.batch_size=8

Runs start from the shipped weights. Each prints one line: what was changed, metrics, and in percent the share of the
object's patches that are alive at the input and after each module (classification), or that each module keeps
(segmentation, detection), the AUC of its scores for "on the object", and the attention on the object over that of a
uniform distribution. Detection adds the mean auxiliary loss of the last 20 steps, and that of the best constant logits.
Records lie in results/search/. A run that is there is not repeated. docs/small_scale.md holds the figures that decided
for the laptop scale.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import yaml

import cropr.training.checkpoint as store
from cropr.data.coco import EvalImages, collate, read_masks
from cropr.data.layouts import write
from cropr.data.loading import EvalBatches
from cropr.data.scenes import OBJECT, object_patches
from cropr.distributed import World
from cropr.records import RECORD
from cropr.tasks import TASKS, TrainSpec, open_task
from cropr.tasks.scoring import Scoring
from cropr.training.loop import LOG, train
from workflow.paper.grid import load_grid

OUT = Path("results/search")
VAL = 2_000
"""Validation images at most."""


def changed(spec: TrainSpec, settings: list[str]) -> TrainSpec:
    """The specification on scenes of seed 1, with ``key.key=value`` settings laid over it."""
    values = spec.model_dump(mode="json")
    values["data"]["scenes"] |= {"seed": 1, "val": min(VAL, values["data"]["scenes"]["val"])}
    for setting in settings:
        path, _, value = setting.partition("=")
        *above, key = path.split(".")
        place = values
        for part in above:
            place = place[part]
        place[key] = yaml.safe_load(value)
    return TrainSpec.model_validate(values)


def look(spec: TrainSpec, images: Path, out: Path) -> list[dict[str, float]]:
    """Series ``scoring`` of a trained detector on the validation images."""
    task = open_task(spec, images)
    model, split = task.build().eval(), task.splits[1]
    store.load_weights(model, out / store.WEIGHTS)
    with torch.no_grad(), Scoring(model) as scoring:
        for index, (image, _) in enumerate(EvalBatches(EvalImages(split, task.data), 1, collate=collate)):
            mask = read_masks(split, index).any(dim=0).numpy() * OBJECT
            scoring.on_object = torch.from_numpy(object_patches(mask, model.backbone.grid_size))[None]
            model(image)
    return scoring.series(lambda sums: sums).get("scoring", [])


def auxiliary_losses(spec: TrainSpec, images: Path, out: Path) -> tuple[float, float]:
    """Auxiliary loss of a detector: mean over the last 20 steps, and of the best constant logits."""
    split, classes = open_task(spec, images).splits[0], spec.data.num_classes
    steps = [json.loads(line)["aux_loss"] for line in (out / LOG).read_text(encoding="utf-8").splitlines()[-20:]]
    seen = torch.zeros(len(split), classes, dtype=torch.float64)
    for index, row in enumerate(seen):
        row[[instance.label - 1 for instance in split.instances(index)]] = 1
    share = seen.mean(dim=0)
    return sum(steps) / len(steps), float((torch.special.entr(share) + torch.special.entr(1 - share)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("rows", nargs="+", metavar="ARTEFACT/ROW")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the specification")
    parser.add_argument("--weights", type=Path, help="start from this file instead of the shipped one")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    args = parser.parse_args()
    grid = load_grid("config")
    for name in args.rows:
        artefact, _, row = name.partition("/")
        run = grid.artefacts[artefact][row].run
        assert run is not None, name
        spec = changed(grid.runs[run], args.set)
        images = OUT / "data" / f"{args.task}-{spec.data.scenes.digest()}"  # type: ignore[union-attr]
        if not (images / RECORD).exists():
            write(spec.data.scenes, images, TASKS[args.task].layout)  # type: ignore[arg-type]
        torch.set_num_threads(1)
        weights = args.weights or Path(grid.shipped[spec.init])
        out = OUT / f"{spec.digest()}-seed{args.seed}-{weights.stem}"
        record = train(spec, args.seed, images, out, world=World(), init=weights)
        measured = record["metrics"]
        metrics = {key: round(measured[key], 1) for key in TASKS[args.task].metrics if key in measured}
        alive = [round(block["object_kept"], 1) for block in record["series"].get("relevance", [])]
        scoring = record["series"].get("scoring", [])
        if args.task == "detection":
            metrics = {key: metrics[key] for key in ("box_ap", "mask_ap", "box_ap50")}
            if scoring := look(spec, images, out):
                learnt, constant = auxiliary_losses(spec, images, out)
                metrics |= {"aux": round(learnt, 3), "aux_constant": round(constant, 3)}
        if args.task != "classification" and scoring:
            alive = [round(block.get("recall_sum", float("nan"))) for block in scoring]
            alive.append([round(block.get("auc_sum", float("nan")), 2) for block in scoring])
            alive.append([round(block["attention_on_object"] / block["object_share"], 2) for block in scoring])
        print(name, *args.set, f"seed {args.seed}", metrics, "alive", alive, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
