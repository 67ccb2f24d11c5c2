"""Print one row of a table beside its baseline.

    python -m workflow.paper.compare --manifest results/laptop/manifests/ablations.json --row no_mlp
    make ablation ROW=no_mlp SEEDS=3        trains what is missing, then does this

Means over seeds with 95 % intervals; the difference is paired by seed. One seed gives no interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cropr.records import read_record
from workflow.paper.load import metric_by_seed
from workflow.paper.quantities import ACCURACIES, COSTS, quantity
from workflow.paper.stats import difference_interval, mean_interval


def comparison(manifest: dict[str, Any], row: str) -> Table:
    """A line for every metric: baseline, row, difference.

    Args:
        manifest: as ``Grid.manifest`` makes it; the training records of both rows must exist.
        row: compared with the manifest's baseline.

    Raises:
        ValueError: a row that the manifest lacks or that has not run.
        FileNotFoundError: a record is missing.
    """
    rows = {entry["row"]: entry for entry in manifest["rows"]}
    if missing := [name for name in (manifest["baseline"], row) if not rows.get(name, {}).get("records")]:
        raise ValueError(f"row {missing[0]!r} has no training records; choose among {', '.join(rows)}")
    entries = [rows[manifest["baseline"]], rows[row]]
    base, ours = ({int(record["seed"]): record for record in map(read_record, entry["records"])} for entry in entries)
    seeds = sorted(base.keys() & ours.keys())
    table = Table(title=f"{manifest['title']}, scale {manifest['scale']}, seeds {', '.join(map(str, seeds))}")
    for column in ("", *(entry["label"] for entry in entries), "difference"):
        table.add_column(column, justify="right" if column else "left")
    for metric in (*ACCURACIES, *COSTS):
        left, right = metric_by_seed(ours, metric), metric_by_seed(base, metric)
        if left.keys() & right.keys():
            digits = quantity(metric).digits + (metric in ACCURACIES)
            means = [mean_interval(list(side.values())).format(digits) for side in (right, left)]
            difference = difference_interval(left, right).format(digits, signed=True)
            table.add_row(quantity(metric).title, *means, difference)
    table.caption = "[95 % interval over seeds]" if len(seeds) > 1 else "one seed: no interval; SEEDS=3 gives one"
    return table


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="as the workflow writes it")
    parser.add_argument("--row", required=True, help="row of the manifest")
    args = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log has no width of its own
    try:
        console.print(comparison(read_record(args.manifest), args.row))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
