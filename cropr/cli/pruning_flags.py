"""Flags that name a model and how it is pruned, for verbs that build one with random weights."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from cropr.pruning.methods import REDUCERS


def add_model_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """``--model``, ``--reducer``, ``--fusion`` and ``--image-size``; returns their group, for more of them."""
    group = parser.add_argument_group("model and pruning")
    group.add_argument("--model", metavar="NAME", help="timm model, such as vit_large_patch16_224")
    group.add_argument("--reducer", choices=sorted(REDUCERS), help="what chooses the tokens (default cropr)")
    group.add_argument("--fusion", choices=["none", "llf"], help="how pruned tokens come back (default llf)")
    group.add_argument("--image-size", type=int, metavar="PX", help="default 224")
    return group


def add_schedule_flags(group: argparse._ArgumentGroup) -> None:
    """``--rate`` and ``--schedule``."""
    group.add_argument("--rate", type=int, metavar="R", help="patch tokens pruned after every block (default 8)")
    group.add_argument("--schedule", metavar="JSON", help='another schedule, such as \'{"stages": {"at": {"6": 50}}}\'')


def pruning(args: argparse.Namespace) -> dict[str, Any]:
    """Reducer, schedule and fusion of a ``PruneSpec``.

    Raises:
        ValueError: flags that do not go together, or a schedule that is neither JSON nor YAML.
    """
    if args.schedule and args.rate is not None:
        raise ValueError(f"--rate {args.rate} and --schedule {args.schedule}: give one of them")
    reducer = args.reducer or "cropr"
    pruned = reducer != "none"
    if not pruned and (args.rate or args.schedule):
        raise ValueError("--reducer none prunes nothing; leave --rate and --schedule out")
    rate = 8 if args.rate is None else args.rate
    schedule: Any = {"constant": {"rate": rate * pruned}}
    if args.schedule:
        try:
            schedule = yaml.safe_load(args.schedule)  # JSON is YAML
        except yaml.YAMLError as error:
            raise ValueError(f"--schedule is neither JSON nor YAML: {error}") from None
    return {"reducer": reducer, "schedule": schedule, "fusion": args.fusion or ("llf" if pruned else "none")}
