"""Print one row of a table beside the row that it is compared with.

examples:
  python -m workflow.paper.compare --manifest results/laptop/compare/ablations/no_mlp.json --row no_mlp
  make ablation ROW=no_mlp SEEDS=3        trains what is missing, then does this

Accuracies are means over seeds with 95 % intervals; the difference is paired by seed. One seed gives no interval.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cropr.records import read_record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="as the workflow writes it")
    parser.add_argument("--row", required=True, help="row of the manifest")
    parser.add_argument("--baseline", metavar="ROW", help="compare with this row instead of the manifest's baseline")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    manifest = read_record(args.manifest)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log has no width of its own
    console.print(comparison(manifest, args.row, args.baseline))


def comparison(manifest: dict[str, Any], row: str, baseline: str | None = None) -> Table:
    """A line a measure: baseline, row, difference.

    Args:
        manifest: as ``Grid.manifest`` makes it; its records must exist.
        row: what is looked at.
        baseline: what it is compared with; None: the manifest's.

    Raises:
        ValueError: a row that the manifest lacks or that has no records, or no baseline.
        FileNotFoundError: a record is missing.
    """
    from workflow.paper.load import metric_by_seed
    from workflow.paper.quantities import ACCURACIES, COSTS, quantity
    from workflow.paper.stats import difference_interval, mean_interval

    rows = {entry["row"]: entry for entry in manifest["rows"]}
    baseline = baseline or _entry(rows, row)["baseline"]
    if baseline is None or baseline == row:
        raise ValueError(f"row {row!r} has nothing to stand beside; name another with --baseline: {', '.join(rows)}")
    entries = [_entry(rows, baseline), _entry(rows, row)]
    theirs, ours = (_records(entry) for entry in entries)
    seeds = sorted(theirs.keys() & ours.keys())
    table = Table(title=f"{manifest['title']}, scale {manifest['scale']}, seeds {', '.join(map(str, seeds))}")
    table.add_column("")
    for entry in entries:
        table.add_column(entry["label"], justify="right")
    table.add_column("difference", justify="right")
    for metric in (*ACCURACIES, *COSTS):
        left, right = metric_by_seed(ours, metric), metric_by_seed(theirs, metric)
        if not left.keys() & right.keys():
            continue
        written = quantity(metric)
        digits = written.digits + (metric in ACCURACIES)  # two runs are looked at more closely than a table's rows
        intervals = (mean_interval(list(side.values())) for side in (right, left))
        difference = difference_interval(left, right).format(digits, signed=True)
        table.add_row(written.title, *(interval.format(digits) for interval in intervals), difference)
    table.caption = "[95 % interval over seeds]" if len(seeds) > 1 else "one seed: no interval; SEEDS=3 gives one"
    return table


def _entry(rows: dict[str, Any], row: str) -> dict[str, Any]:
    if row not in rows:
        raise ValueError(f"the manifest has no row {row!r}; it has {', '.join(rows)}")
    return rows[row]


def _records(entry: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Training records by seed."""
    if not entry["records"]:
        raise ValueError(f"row {entry['row']!r} has no training records ({entry['why'] or 'none in this manifest'})")
    return {int(record["seed"]): record for record in map(read_record, entry["records"])}


def main(argv: list[str] | None = None) -> int:
    """Run as a program. Returns the exit status: 0, or 2 for an error of the user's, in one message."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow.paper.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
