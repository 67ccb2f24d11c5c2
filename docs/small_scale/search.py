"""Try rows and settings of the laptop scale on images that no table uses: scenes of seed 1.

    python docs/small_scale/search.py classification imagenet_methods/none imagenet_methods/random_r8_llf
    python docs/small_scale/search.py segmentation ade20k/cropr --set recipe.query_lr=1 --seed 1

Runs start from the shipped weights. Each prints one line: what was changed, metrics, and in percent the share of the
object's patches that are alive at the input and after each module (classification), or that each module keeps
(segmentation), and the AUC of its scores for "on the object". Records lie in results/search/.
A run that is there is not repeated. docs/small_scale.md holds the figures that decided for the laptop scale.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml

from cropr.data.layouts import write
from cropr.distributed import World
from cropr.records import RECORD
from cropr.tasks import TASKS, TrainSpec
from cropr.training.loop import train
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
        if args.task == "segmentation" and scoring:
            alive = [round(block.get("recall_sum", float("nan"))) for block in scoring]
            alive.append([round(block.get("auc_sum", float("nan")), 2) for block in scoring])
        print(name, *args.set, f"seed {args.seed}", metrics, "alive", alive, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
