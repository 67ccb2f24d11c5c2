"""Manifest + records + published numbers -> one tidy frame a table or figure is drawn from.

    artefact = load("results/laptop/manifests/imagenet_methods.json")
    artefact.frame.loc["cropr_llf", ["top1.measured", "top1.low", "top1.high", "top1.published"]]

The frame has a line per row of the grid, and columns ``<quantity>.<kind>``, kind one of measured, low, high (of what
is measured), published, bound, predicted. Kinds never share a column.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cropr.records import read_record, write_text
from workflow.paper.quantities import FORMULA, QUANTITIES, TASKS, Measures
from workflow.paper.stats import Interval, difference_interval, mean_interval

Record = dict[str, Any]
KINDS = ("measured", "low", "high", "published", "bound", "predicted")
CONFIDENCE = {
    "T": "read off the paper's own table",
    "L": "from the authors' published training logs",
    "R": "from third-party notes that quote the paper",
    "I": "inferred, not stated by the paper",
    "T/R": "partly read off the paper, partly from third-party notes",
}
"""What the letters of ``confidence`` in ``config/published/*.csv`` mean."""

RELEVANCE = ("kept_on_object", "object_kept")
"""Share of the kept patches that lie on the object; share of the object's patches that are still alive. Percent."""
_PATCH = re.compile(r"patch(\d+)")
"""timm writes the side of a patch into its models' names."""
_LOG = logging.getLogger("cropr")


class Row(BaseModel):
    """One row of the grid, as the workflow resolved it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    row: str
    label: str
    columns: dict[str, Any] = Field(default_factory=dict)
    available: bool = True
    why: str | None = None
    run: str | None = None
    baseline: str | None = None
    records: list[Path] = Field(default_factory=list)
    bench: Path | None = None
    maps: Path | None = None

    @property
    def reducer(self) -> str:
        """Name of the method, for its colour; the row's own name where the grid gives none."""
        return str(self.columns.get("reducer", self.row))

    @property
    def unpruned(self) -> bool:
        """Whether it prunes nothing: every measurement of speed has that model beside the pruned one."""
        return self.reducer == "none"


class Manifest(BaseModel):
    """What the workflow tells a notebook: the rows of an artefact and where their records lie."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    artefact: str
    title: str
    task: str = "classification"
    scale: str
    seeds: list[int]
    results: Path
    published: Path | None = None
    rows: list[Row]


@dataclass(frozen=True)
class Artefact:
    """Everything that one table or figure is made of."""

    manifest: Manifest
    runs: Mapping[str, Mapping[int, Record]]
    """Training records by row and seed; rows without training are missing."""
    benches: Mapping[str, Record]
    """Throughput records by row."""
    published: pd.DataFrame
    """Columns row, quantity, value, source, confidence."""
    frame: pd.DataFrame
    """Index ``row``; see the head of this module."""
    root: Path
    """What the manifest's paths are relative to."""

    @property
    def rows(self) -> dict[str, Row]:
        """Rows by name, in the order of the grid."""
        return {row.row: row for row in self.manifest.rows}

    @property
    def measures(self) -> Measures:
        """What its task is judged by."""
        return TASKS[self.manifest.task]

    @property
    def primary(self) -> str:
        """The quantity by which its rows are ranked: top-1, mIoU, box AP."""
        return self.measures.primary

    @property
    def baseline(self) -> str | None:
        """The row that the others are compared with."""
        return next((row.baseline for row in self.manifest.rows if row.baseline in self.rows), None)

    def values(self, row: str, metric: str) -> dict[int, float]:
        """A training metric by seed; empty for a row without records or a metric that none of them has."""
        return metric_by_seed(self.runs.get(row, {}), metric)

    def rounds(self, row: str) -> int:
        """How often a row's speed was read; 0 where it was not."""
        return len(self.benches.get(row, {}).get("series", {}).get("seconds", ()))

    def interval(self, row: str, quantity: str) -> Interval | None:
        """A measured quantity with its bounds, where there are any; None if it was not measured."""
        mean, low, high = (self.number(row, f"{quantity}.{kind}") for kind in ("measured", "low", "high"))
        if np.isnan(mean):
            return None
        seeds = len(self.runs.get(row, {})) or 1
        return Interval(mean, None, None, seeds) if np.isnan(low + high) else Interval(mean, low, high, seeds)

    def number(self, row: str, column: str) -> float:
        """One number of the frame, for example ``speedup.bound``; NaN where there is none."""
        return float(self.frame[column][row]) if column in self.frame else float("nan")

    def reducer(self, row: str) -> str:
        """Method of a row, for its colour: what its records say, else what the manifest says."""
        for record in [*self.runs.get(row, {}).values(), *filter(None, [self.benches.get(row)])]:
            if name := record.get("spec", {}).get("prune", {}).get("reducer"):
                return str(name)
        return self.rows[row].reducer


def load(path: str | Path, results: str | Path | None = None) -> Artefact:
    """Read a manifest and all that it names.

    Args:
        path: the manifest, absolute or relative to the working directory or to one of its parents, so that a notebook
            opened in ``notebooks/`` finds what one started by the workflow finds. Its own paths are relative to the
            same directory.
        results: where tables and figures go, instead of the manifest's ``results``.

    Raises:
        FileNotFoundError: no manifest, or a row that is available has no record; with the command that makes it.
        ValueError: not a manifest, or a record that is not one.
    """
    root, path = _locate(Path(path))
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(f"{path} is not a manifest of this version: {error}") from None
    if results is not None:
        manifest = manifest.model_copy(update={"results": Path(results)})
    runs: dict[str, dict[int, Record]] = {}
    benches: dict[str, Record] = {}
    for row in manifest.rows:
        if not row.available:
            continue
        if records := [_read(root / file, file, manifest, "seed") for file in row.records]:
            runs[row.row] = {int(record["seed"]): record for record in records}
        if row.bench is not None:
            benches[row.row] = _read(root / row.bench, row.bench, manifest)
    published = read_published(root / manifest.published if manifest.published else None)
    if unknown := sorted(set(published["row"]) - {row.row for row in manifest.rows}):
        _LOG.warning("%s: published numbers of rows that the grid lacks: %s", manifest.published, ", ".join(unknown))
    frame = _frame(manifest, runs, benches, published)
    return Artefact(manifest, runs, benches, published, frame, root)


def read_published(path: Path | None) -> pd.DataFrame:
    """Published numbers: columns row, quantity, value, source, confidence; empty without a path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, a value is no number, or a number is given twice.
    """
    columns = ["row", "quantity", "value", "source", "confidence"]
    if path is None:
        return pd.DataFrame(columns=columns)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no published numbers; restore it from the repository")
    table = pd.read_csv(path, comment="#", dtype={"row": str, "source": str, "confidence": str})
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"{path}: column {missing[0]!r} is missing; it needs {', '.join(columns)}")
    table["value"] = pd.to_numeric(table["value"], errors="coerce")
    for problem, lines in (("has no number", table["value"].isna()), ("twice", table.duplicated(["row", "quantity"]))):
        if lines.any():
            line = table[lines].iloc[0]
            raise ValueError(f"{path}: {line['row']}, {line['quantity']}: {problem}; give each number once")
    return table[columns]


def write_tables(artefact: Artefact, markdown: str) -> list[Path]:
    """Write ``<results>/tables/<artefact>.csv`` (the frame) and ``.md`` (what the notebook shows), whole or not at all.

    Returns:
        The two paths.
    """
    stem = artefact.root / artefact.manifest.results / "tables" / artefact.manifest.artefact
    csv, md = stem.with_suffix(".csv"), stem.with_suffix(".md")
    write_text(csv, artefact.frame.to_csv(lineterminator="\n", float_format="%.6g"))
    write_text(md, markdown if markdown.endswith("\n") else markdown + "\n")
    return [csv, md]


def metric_by_seed(records: Mapping[int, Record], metric: str) -> dict[int, float]:
    """A metric of several records of one run, by seed; relevance is that after the last block that prunes."""
    return {seed: value for seed, record in records.items() if (value := _metric(record, metric)) is not None}


def pruned_share(record: Record) -> float | None:
    """Patches that are pruned anywhere over all patches, in percent (TPR; paper, section 4).

    What the record says of it, else from its token counts; None where the patches cannot be counted.
    """
    if "tpr" in record["metrics"]:
        return float(record["metrics"]["tpr"])
    spec, tokens = record["spec"], record.get("tokens")
    side = spec["model"].get("args", {}).get("patch_size")
    if side is None and (match := _PATCH.search(spec["model"]["name"])):
        side = int(match[1])
    if not tokens or side is None:
        return None
    # Prefix tokens are never pruned, so the difference is one of patches.
    return 100 * (tokens[0] - min(tokens)) / (spec["data"]["image_size"] // side) ** 2


def make_command(manifest: Manifest, target: str | Path | None = None) -> str:
    """The command that makes a file of this scale, the whole artefact (None), or everything (an empty target)."""
    seeds = ""
    if manifest.seeds == list(range(len(manifest.seeds))):
        seeds = f" seeds={len(manifest.seeds)}" if len(manifest.seeds) > 1 else ""
    else:
        seeds = f" seeds={','.join(map(str, manifest.seeds))}"
    target = manifest.artefact if target is None else target
    return f"snakemake --cores all {target} --config scale={manifest.scale}{seeds}".replace("  ", " ")


def _locate(path: Path) -> tuple[Path, Path]:
    """The directory that relative paths start from, and the manifest."""
    for root in [Path.cwd()] if path.is_absolute() else [Path.cwd(), *Path.cwd().parents]:
        if (root / path).is_file():
            return root, root / path
    raise FileNotFoundError(
        f"{path}: no manifest under {Path.cwd()} or above; the workflow writes it: snakemake --cores all"
    )


def _read(path: Path, named: Path, manifest: Manifest, *keys: str) -> Record:
    try:
        record = read_record(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{named}: no record; make it with: {make_command(manifest, named)}") from None
    if missing := [key for key in ("metrics", "provenance", *keys) if key not in record]:
        raise ValueError(f"{named}: a record without {missing[0]!r}; delete it and run the job again")
    return record


def _frame(
    manifest: Manifest,
    runs: Mapping[str, Mapping[int, Record]],
    benches: Mapping[str, Record],
    published: pd.DataFrame,
) -> pd.DataFrame:
    lines, measures = [], TASKS[manifest.task]
    for row in manifest.rows:
        records = runs.get(row.row, {})
        line: dict[str, Any] = {"row": row.row, "label": row.label, **row.columns}
        line |= {"available": row.available, "why": row.why, "seeds": len(records)}
        line |= _trained(records, measures)
        if row.baseline is not None and row.baseline != row.row:
            line |= _against(records, runs.get(row.baseline, {}), measures)
        if bench := benches.get(row.row):
            line |= _benched(bench["metrics"])
        elif row.row == row.baseline and row.unpruned and (beside := next(iter(benches.values()), None)):
            line |= _beside(beside["metrics"])
        for _, number in published[published["row"] == row.row].iterrows():
            line[f"{number['quantity']}.published"] = float(number["value"])
        lines.append(line)
    frame = pd.DataFrame(lines).set_index("row")
    _published_differences(frame, manifest, measures)
    columns = [str(name) for name in frame]
    numbers = sorted((name for name in columns if name.rpartition(".")[2] in KINDS), key=_column_order)
    texts = [name for name in columns if name not in numbers]
    return frame.astype(dict.fromkeys(numbers, float))[texts + numbers]


def _metric(record: Record, metric: str) -> float | None:
    if metric == "tpr":
        return pruned_share(record)
    relevance = record.get("series", {}).get("relevance", [])
    last: Mapping[str, float] = max(relevance, key=lambda entry: entry["block"], default={})
    value = (last if metric in RELEVANCE else record["metrics"]).get(metric)
    return None if value is None else float(value)


def _trained(records: Mapping[int, Record], measures: Measures) -> dict[str, float | None]:
    """Every known metric of a run's records over its seeds; what a formula gives is that of the timed model."""
    line: dict[str, float | None] = {}
    for metric, entry in QUANTITIES.items():
        if metric not in FORMULA and (values := list(metric_by_seed(records, metric).values())):
            line |= {f"{metric}.measured": values[0]} if entry.exact else _kinds(metric, mean_interval(values))
    if measures.median and (values := list(metric_by_seed(records, measures.primary).values())):
        line[f"{measures.primary}_median.measured"] = float(np.median(values))
    return line


def _against(
    records: Mapping[int, Record], baseline: Mapping[int, Record], measures: Measures
) -> dict[str, float | None]:
    """Paired differences and ratios to the baseline's run of the same seed."""
    line: dict[str, float | None] = {}
    for metric in measures.compared:
        ours, theirs = metric_by_seed(records, metric), metric_by_seed(baseline, metric)
        if ours.keys() & theirs.keys():
            line |= _kinds(f"{metric}_difference", difference_interval(ours, theirs))
    ours, theirs = metric_by_seed(records, "step_ms"), metric_by_seed(baseline, "step_ms")
    if seeds := sorted(ours.keys() & theirs.keys()):
        line |= _kinds("train_speedup", mean_interval([theirs[seed] / ours[seed] for seed in seeds]))
    return line


def _benched(metrics: Mapping[str, float]) -> dict[str, float | None]:
    if "bound" not in metrics:
        return {}  # of another kind, such as a plan, whose page reads its series
    bound = metrics["bound"]
    low, high = metrics.get("speedup_low"), metrics.get("speedup_high")
    line: dict[str, float | None] = {
        f"{name}.{'predicted' if name in FORMULA else 'measured'}": metrics[name]
        for name in QUANTITIES
        if name in metrics
    }
    # The record has the share as a fraction; here it is a percentage, with the bounds of the speed-up.
    line |= {
        "speedup.low": low,
        "speedup.high": high,
        "speedup.bound": bound,
        "share_of_bound.measured": 100 * metrics["speedup"] / bound,
        "share_of_bound.low": None if low is None else 100 * low / bound,
        "share_of_bound.high": None if high is None else 100 * high / bound,
    }
    if "bound_whole" in metrics:
        line |= {f"speedup_whole.{end}": metrics[f"speedup_whole_{end}"] for end in ("low", "high")}
        line["speedup_whole.bound"] = metrics["bound_whole"]
    if metrics.get("weights_mb") and metrics.get("base_weights_mb"):
        line["weights_extra.measured"] = 100 * (metrics["weights_mb"] / metrics["base_weights_mb"] - 1)
    return line


def _beside(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The unpruned model as another row's measurement has it, where the scale saves it one of its own."""
    names = ("images_per_s", "images_per_s_whole", *FORMULA)
    values = {name: metrics[f"base_{name}"] for name in names if f"base_{name}" in metrics}
    return {f"{name}.{'predicted' if name in FORMULA else 'measured'}": value for name, value in values.items()}


def _published_differences(frame: pd.DataFrame, manifest: Manifest, measures: Measures) -> None:
    """Fill ``<metric>_difference.published`` from the published accuracies, where the paper does not give it itself."""
    for metric in measures.compared:
        column, accuracy = f"{metric}_difference.published", f"{metric}.published"
        if accuracy not in frame:
            continue
        if column not in frame:
            frame[column] = np.nan
        for row in manifest.rows:
            if row.baseline is not None and row.baseline != row.row and pd.isna(frame[column][row.row]):
                difference = frame[accuracy][row.row] - frame[accuracy][row.baseline]
                frame.loc[row.row, column] = round(float(difference), 6)


def _kinds(quantity: str, interval: Interval) -> dict[str, float | None]:
    return {
        f"{quantity}.measured": interval.mean,
        f"{quantity}.low": interval.low,
        f"{quantity}.high": interval.high,
    }


def _column_order(name: str) -> tuple[int, str, int]:
    quantity, _, kind = name.rpartition(".")
    order = list(QUANTITIES)
    return (order.index(quantity) if quantity in order else len(order), quantity, KINDS.index(kind))
