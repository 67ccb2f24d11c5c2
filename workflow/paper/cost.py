"""What a scale costs: jobs, training hours and disk, by artefact, before anything is started.

    python -m workflow.paper.cost paper

Hours follow from the authors' training times (``training_hours`` in ``config/published/``; their GPUs are not known) in
proportion to the tokens that the blocks process; a third more where activations are computed again. For detection,
those of classification are taken: attention over many tokens and the heads come on top. Models of another width than
ViT-L have no estimate (-).
Disk is that of the trained weights, float32. A job that several artefacts need is counted in the first.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from cropr.pruning.methods import before_last_block
from cropr.pruning.schedule import Schedule, attended
from cropr.tasks import TASKS, TrainSpec
from workflow.paper.configuration import ModelBlock
from workflow.paper.grid import Grid, load_grid

CONFIG = Path(__file__).parents[2] / "config"
IMAGES = {"classification": 1_281_167, "segmentation": 20_210, "detection": 117_266}
"""Training images of ImageNet-1k, ADE20k and COCO 2017 (those with an object), as their authors publish them."""
HOST, MODULE = 304_326_632, 9_423_848
"""Parameters of ViT-L/16 and of one Cropr module (docs/authors_code.md)."""
WIDE = "_large_"


def tokens(spec: TrainSpec, model: ModelBlock) -> tuple[int, int]:
    """Tokens that enter all blocks together, of one image, and blocks after which some are pruned."""
    patches, fused = (spec.data.image_size // model.patch_size) ** 2, before_last_block(spec.prune.fusion)
    schedule = Schedule.from_config(spec.prune.schedule)
    counts = schedule.resolve(patches, model.depth, fused, model.prefix)
    modules = sum(after < before for before, after in pairwise((patches, *counts)))
    return sum(attended(counts, patches, fused, model.prefix)), modules


def training(grid: Grid, run: str, rates: dict[tuple[str, bool], float]) -> tuple[float, float]:
    """Hours of a run, and GB of its weights."""
    spec = grid.spec(run)
    entered, modules = tokens(spec, grid.config.tasks[spec.task].model)
    scenes = spec.data.scenes
    images = spec.recipe.epochs * (scenes.train if scenes else IMAGES[spec.task])
    again = 4 / 3 if spec.recipe.grad_checkpointing else 1
    scored = spec.prune.reducer in ("cropr", "non_salient")
    rate = rates.get((spec.task, modules > 0)) or rates["classification", modules > 0]
    return rate * entered * images * again, 4e-9 * (HOST + scored * modules * MODULE)


def published(grid: Grid) -> dict[tuple[str, bool], float]:
    """Hours a token and image of a task, without (False) and with pruning."""
    rates = {}
    for task, table, file, rows in (
        ("classification", "imagenet_methods", "memory", ("none", "cropr_r8_llf")),
        ("segmentation", "ade20k", "ade20k", ("none", "none")),
    ):
        lines = (
            line.split(",") for line in (CONFIG / f"published/{file}.csv").read_text(encoding="utf-8").splitlines()
        )
        hours = {line[0]: float(line[2]) for line in lines if line[1:2] == ["training_hours"]}
        for pruned, row in enumerate(rows):
            spec = grid.spec(str(grid.artefacts[table][row].run))
            entered, _ = tokens(spec, grid.config.tasks[task].model)
            rates[task, bool(pruned)] = hours[row] / (entered * spec.recipe.epochs * IMAGES[task])
    return rates


def estimate(scale: str) -> list[dict[str, Any]]:
    """A row for each artefact: training runs, other jobs, hours, GB. The user's folders need not exist."""
    with tempfile.TemporaryDirectory() as folder:
        for name in {name for task in TASKS.values() for name in task.folders}:
            (Path(folder) / name / "a").mkdir(parents=True)
            (Path(folder) / name / "b").mkdir()
        roots = dict.fromkeys(("imagenet", "ade20k", "coco", "folder"), Path(folder))
        grid, paper = (load_grid(CONFIG, name, roots=roots) for name in (scale, "paper"))
    rates, seen, rows = published(paper), set[str](), []
    for name in grid.artefacts:
        new = set(grid.files(name)) - seen
        seen |= new
        runs = [Path(file).parent.parent.name for file in new if "/runs/" in file]
        costs = [training(grid, run, rates) for run in runs if WIDE in grid.spec(run).model.name]
        hours, size = [sum(both) for both in zip(*costs, strict=True)] or [math.nan if runs else 0.0] * 2
        others = len(new) - len(runs) + 2  # the manifest and the notebook, too
        rows.append({"artefact": name, "runs": len(runs), "other jobs": others, "hours": hours, "GB": size})
    return rows


def main(scale: str) -> None:
    """Print the table and its sums."""
    rows = estimate(scale)
    known = {key: [row[key] for row in rows if not math.isnan(row[key])] for key in rows[0] if key != "artefact"}
    rows.append({"artefact": "all", **{key: sum(values) if values else math.nan for key, values in known.items()}})
    lines = [list(rows[0])]
    for name, *numbers in map(dict.values, rows):
        lines.append([name, *("-" if math.isnan(value) else f"{value:.0f}" for value in numbers)])
    sys.stdout.write("".join("{:<28}{:>6}{:>12}{:>11}{:>7}\n".format(*line) for line in lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m workflow.paper.cost", description=__doc__)
    parser.add_argument("scale", nargs="?", default="paper", help="default %(default)s")
    try:
        main(parser.parse_args().scale)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
