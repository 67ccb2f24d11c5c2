"""Kills and broken input, at length: ``make torture KILLS=100 INPUTS=100000 SEED=0``. Not part of ``make test``."""

import argparse
import os
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), *(str(TESTS / folder) for folder in ("cropr", "paper", "workflow", "torture"))]


def main() -> int:
    """Run both parts. Returns 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--inputs", type=int, default=100_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", default="", metavar="NAME", help="kinds of job and families that begin so")
    args = parser.parse_args()
    import fuzz
    import kills

    failed = kills.run(args.kills, args.seed, args.only) if args.kills else 0
    failed += fuzz.run(args.inputs, args.seed, args.only) if args.inputs else 0
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
