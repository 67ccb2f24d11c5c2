"""Kills and broken input, at length: ``make torture KILLS=100 INPUTS=100000 SEED=0``. Not part of ``make test``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
sys.path[:0] = [str(Path(__file__).parents[2]), *(str(Path(__file__).parents[1] / folder) for folder in ("cropr", "paper", "workflow", "torture"))]


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Run both parts. Returns 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--inputs", type=int, default=100_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", default="", metavar="NAME", help="kinds of job and families that begin with this")
    args = parser.parse_args()
    import fuzz
    import kills

    found = kills.run(args.kills, args.seed, say, args.only) if args.kills else 0
    found += fuzz.run(args.inputs, args.seed, say, args.only) if args.inputs else 0
    return int(found > 0)


if __name__ == "__main__":
    raise SystemExit(main())
