"""Print one row of a table beside its baseline, or two results folders beside each other.

    python -m workflow.paper.compare --manifest results/laptop/manifests/ablations.json --row no_mlp
    make ablation ROW=no_mlp SEEDS=3        trains what is missing, then does this
    python -m workflow.paper.compare results/laptop /path/to/other/results/laptop    my hardware against yours

Means with 95 % intervals; the difference is paired by seed and by image. One seed gives an interval over images alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from workflow.paper.records import load_manifest, load_records, load_speed
from workflow.paper.stats import mcnemar, mean_interval, median_interval, paired_difference, with_interval

COSTS = {
    "loss": ("Validation loss", 3),
    "tpr": ("Pruned patches (%)", 1),
    "parameters_training_only": ("Parameters of training alone", 0),
}
"""What stands below the metrics of the task: label and digits."""


def comparison(artefact: str, row: str, results: str | Path) -> Table:
    """A line for every metric: baseline, row, difference.

    Args:
        artefact: name of a table with a baseline.
        row: compared with the baseline; the training records of both must exist, others need not.
        results: folder of a scale.

    Raises:
        ValueError: a row that the table lacks or that has not run.
        FileNotFoundError: a record is missing.
    """
    manifest = load_manifest(artefact, results)
    baseline, rows = manifest["baseline"], {entry["row"]: entry for entry in manifest["rows"]}
    if missing := [name for name in (baseline, row) if not rows.get(name, {}).get("records")]:
        raise ValueError(f"row {missing[0]!r} has no training records; choose one of {', '.join(rows)}")
    runs = load_records(artefact, results, rows=(baseline, row))
    seeds = sorted(runs["seed"].unique())
    table = Table(title=f"{manifest['title']}, scale {manifest['scale']}, seeds {', '.join(map(str, seeds))}")
    for column in ("", rows[baseline]["label"], rows[row]["label"], "difference", "interval over"):
        table.add_column(column, justify="right" if column else "left")
    metrics = {name: (f"{label} (%)", 2) for name, label in manifest["metrics"].items()} | COSTS
    for metric, (label, digits) in metrics.items():
        if metric in runs and runs[metric].notna().all():
            means = with_interval(mean_interval(runs, metric), digits)
            difference = paired_difference(runs, metric, baseline)
            written = with_interval(difference, digits, signed=True)
            table.add_row(label, means[baseline], means[row], written[row], difference["over"][row])
    checks = [f"seed {seed}: {won} images won, {lost} lost, p = {p:.2g}"
              for _, seed, won, lost, p in mcnemar(runs, baseline).itertuples(index=False)]  # fmt: skip
    lines = ["[95 % interval]"] + (["McNemar, top-1, " + "; ".join(checks)] if checks else [])
    if len(seeds) == 1:
        lines.append("One seed says nothing of another; SEEDS=3 gives intervals over seeds too.")
    table.caption = "\n".join(lines)
    return table


def beside(first: Path, second: Path) -> Iterator[Table]:
    """A table for each artefact that two results folders have: accuracy, speed-up and images per second of each row.

    Raises:
        ValueError: they share no artefact that trains or measures rows.
        FileNotFoundError: a record is missing.
    """
    names = [{file.stem for file in (folder / "manifests").glob("*.json")} for folder in (first, second)]
    shared = [name for name in sorted(names[0] & names[1]) if load_manifest(name, first)["metrics"]]
    if not shared:
        raise ValueError(f"{first} and {second} share no table of trained rows; each should be results/<scale>")
    for artefact in shared:
        manifest, columns, sides = load_manifest(artefact, first), dict[str, pd.Series](), []
        for name, folder in (("A", first), ("B", second)):
            metric, label = next(iter(manifest["metrics"].items()))
            found = {f"{label} (%)": mean_interval(load_records(artefact, folder), metric)}
            sides.append(f"{name}: {folder}")
            if len(speed := load_speed(artefact, folder)):
                sides[-1] += f" (speed: {speed['device'].iloc[0]})"
                speed["images_per_s"] = speed["batch_size"] / speed["seconds"]
                found |= {"speed-up": median_interval(speed, "speedup")}
                found |= {"images/s": median_interval(speed, "images_per_s")}
            columns |= {f"{label}, {name}": with_interval(values, 2) for label, values in found.items()}
        lines = pd.DataFrame(dict(sorted(columns.items()))).reindex([row["row"] for row in manifest["rows"]])
        table = Table("", *lines, title=manifest["title"], caption=", ".join(sides) + " [95 % interval]")
        for row, values in lines.dropna(how="all").fillna("").iterrows():
            table.add_row(str(row), *values)
        yield table


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="two results folders, instead of flags")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="as the workflow writes it")
    parser.add_argument("--row", help="row of the manifest")
    args = parser.parse_args()
    if len(args.folders) != 2 * (args.manifest is None) or (args.manifest is None) != (args.row is None):
        parser.error("give two results folders, or --manifest FILE and --row ROW")
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a log has no width of its own
    try:
        if args.folders:
            console.print(*beside(*args.folders), sep="\n")
        else:
            console.print(comparison(args.manifest.stem, args.row, args.manifest.resolve().parents[1]))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
