"""How many steps does a Cropr module of the laptop detector need? A module alone, on the tokens of a frozen encoder.

    python docs/small_scale/probe.py --batch 16 --lr 2.5e-4
    python docs/small_scale/probe.py --batch 16 --lr 2.5e-4 --epochs 8

Trains on the tokens of 2,500 scenes of seed 1 after a block of the unpruned detector as shipped, with the detector's
auxiliary loss, warm-up, half cosine, weight decay and clipping. Each line: block, training seed; of 400 validation
images the AUC of the scores for "on the object" and the share of the object's patches among the 16 of highest score;
the loss over the last 20 steps. The first line is the loss of the best constant logits.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import cropr.training.checkpoint as store
from cropr.data.coco import EvalImages, read_masks
from cropr.data.layouts import write
from cropr.data.scenes import OBJECT, object_patches
from cropr.pruning.scorer import Aggregator, AuxiliaryHead, Scorer
from cropr.records import RECORD
from cropr.tasks import TASKS, open_task
from cropr.tasks.scoring import figures
from workflow.paper.grid import load_grid

BLOCKS, TRAIN, VAL, PART = (2, 3, 4, 6), 2_500, 400, 50


@torch.no_grad()
def tokens(task, backbone, split, count: int) -> tuple[dict[int, Tensor], Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Tokens after each block [images, patches, C], classes there are [images, K], patches on objects as the tokens."""
    images, after, classes, objects = EvalImages(split, task.data), {block: [] for block in BLOCKS}, [], []
    for first in range(0, count, PART):
        part = range(first, first + PART)
        now, position = backbone.embed(torch.stack([images.sample(index)[0] for index in part]))
        places = now.index
        for block in range(1, max(BLOCKS) + 1):
            now = backbone.run(block, now, position)
            if block in BLOCKS:
                after[block].append(now.x)
        for index in part:
            classes.append(torch.zeros(task.data.num_classes))
            classes[-1][[instance.label - 1 for instance in split.instances(index)]] = 1
            mask = read_masks(split, index).any(dim=0).numpy() * OBJECT
            objects.append(torch.from_numpy(object_patches(mask, backbone.grid_size))[places[0]])
    return {block: torch.cat(x) for block, x in after.items()}, torch.stack(classes), torch.stack(objects)


def fit(x: Tensor, classes: Tensor, args: argparse.Namespace, seed: int) -> tuple[Scorer, float]:
    """A trained scorer, and its loss over the last 20 steps."""
    torch.manual_seed(seed)
    dim, weight = x.shape[-1], torch.tensor(args.positive)
    scorer, aggregator, head = Scorer(dim), Aggregator(dim), AuxiliaryHead(dim, classes.shape[1])
    others = [*aggregator.parameters(), *head.parameters()]
    groups = [{"params": [scorer.queries], "peak": args.query_lr}, {"params": others, "peak": args.lr}]
    optimizer, losses = torch.optim.AdamW(groups, weight_decay=0.05), list[float]()
    total = args.epochs * (len(x) // args.batch)
    warmup = int(0.08 * total)
    for _ in range(args.epochs):
        for chosen in torch.randperm(len(x)).split(args.batch)[: len(x) // args.batch]:
            step = len(losses)
            rise, fall = (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * (rise if step < warmup else fall)
            output = head(aggregator(*scorer(x[chosen])))
            target = classes[chosen][:, None].expand_as(output)
            loss = F.binary_cross_entropy_with_logits(output, target, pos_weight=weight)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([scorer.queries, *others], 1.0)
            optimizer.step()
            losses.append(loss.item())
    return scorer, sum(losses[-20:]) / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2.5e-4, help="peak, of aggregator and head")
    parser.add_argument("--query-lr", type=float, default=0.02, help="peak, of the query")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--positive", type=float, default=1.0, help="weight of the classes that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    grid = load_grid("config")
    run = grid.artefacts["coco"]["none"].run
    assert run is not None
    values = grid.runs[run].model_dump(mode="json")
    values["data"]["scenes"]["seed"] = 1
    spec = type(grid.runs[run]).model_validate(values)
    data = Path("results/search/data") / f"detection-{spec.data.scenes.digest()}"  # type: ignore[union-attr]
    if not (data / RECORD).exists():
        write(spec.data.scenes, data, TASKS["detection"].layout)  # type: ignore[arg-type]
    task = open_task(spec, data)
    model, _ = store.initial_model(task, Path(grid.shipped[spec.init]), resuming=False)
    splits = zip(task.splits, (TRAIN, VAL), strict=True)
    (x, classes, _), (seen, _, objects) = (tokens(task, model.eval().backbone, *one) for one in splits)
    share = classes.double().mean(dim=0)
    print(f"constant {(torch.special.entr(share) + torch.special.entr(1 - share)).mean():.3f}")  # noqa: T201
    for block in BLOCKS:
        for seed in (0, 1):
            scorer, loss = fit(x[block], classes, args, seed)
            with torch.no_grad():
                found = figures(scorer(seen[block])[0], x[block].shape[-1], objects, 16)
            auc, kept = (found[name].nanmean() for name in ("auc_sum", "recall_sum"))
            print(f"block {block} seed {seed} AUC {auc:.2f} kept {kept:.0f} loss {loss:.3f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
