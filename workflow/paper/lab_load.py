"""Records of the laboratory (``python -m cropr lab``) as one frame: a line per cell that was measured, or could not be.

    artefact = with_cells(begin(manifest, results))
    artefact.number("vit_l_224/cropr_llf/amp_bf16/flash/4", "speedup.measured")

A cell is a variant of a model in one setting. Kinds of numbers are those of ``workflow.paper.load``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from cropr.pruning.schedule import Schedule
from workflow.paper import style
from workflow.paper.load import KINDS, Artefact, Record
from workflow.paper.quantities import FORMULA, QUANTITIES, Quantity

UNPRUNED = "unpruned"

LAB_QUANTITIES = {
    "gain": Quantity("Over the first setting, unpruned", "x", digits=2),
    "over_all_queries": Quantity("Over all queries", "x", digits=3),
    "kept_in_both": Quantity("Same tokens kept", "%", digits=1),
    "mfu": Quantity("MFU", "%", digits=0),
    "working_memory_mb": Quantity("Memory of a pass", "MB", digits=0),
    "training_memory_mb": Quantity("Memory, training", "MB", digits=0),
    "inference_memory_mb": Quantity("Memory, inference", "MB", digits=0),
    "state_mb": Quantity("Weights and moments", "MB", digits=0),
    "total_ms": Quantity("Forward pass", "ms"),
    "pruning_share": Quantity("Pruning's own share", "%", digits=2),
    "block_ms": Quantity("One block", "ms", digits=2),
}
"""What only these records hold; the rest is in ``quantities``."""

SCORING = {"one_vector": "one vector", "all_queries": "all queries, then summed"}
"""What the two pruned models of a measurement of scoring are called."""

_AXES = ("variant", "precision", "attention", "batch_size")
_PERCENT = ("mfu", "pruning_share", "share_of_bound", "kept_in_both")
_FORMULA = FORMULA | {"block_gmacs"}
_SKIPPED = ("block_s", "total_s", "matmul_gflops")


def entry(name: str) -> Quantity:
    """How a quantity of a cell is written."""
    return LAB_QUANTITIES.get(name) or QUANTITIES[name]


def with_cells(artefact: Artefact) -> Artefact:
    """The artefact with a line for every cell of its records in its frame, which is what its CSV then holds."""
    lines: list[dict[str, Any]] = []
    for row, record in artefact.benches.items():
        names = variant_names(record["spec"].get("variants", {})) | SCORING
        lines += [_line(row, artefact.rows[row].label, record, cell, names) for cell in record["cells"]]
    empty = pd.DataFrame(columns=["cell", "row", "label", *_AXES, "name", "tokens", "fitted", "why"])
    frame = (pd.DataFrame(lines) if lines else empty).set_index("cell")
    numbers = [str(name) for name in frame if str(name).rpartition(".")[2] in KINDS]
    return replace(artefact, frame=frame.astype(dict.fromkeys(numbers, float)))


def measure_of(artefact: Artefact, row: str) -> str:
    """Kind of measurement behind a row: a key of ``cropr.bench.specs.MEASURES``."""
    return str(artefact.benches[row]["spec"]["measure"])


def rows_of(artefact: Artefact, measure: str) -> list[str]:
    """Rows whose record is of this kind, in the order of the grid."""
    return [row for row in artefact.benches if measure_of(artefact, row) == measure]


def cells_of(artefact: Artefact, row: str, measured: bool = True) -> pd.DataFrame:
    """The lines of one row, without those that could not run unless ``measured`` is False."""
    frame = artefact.frame
    chosen = frame["row"] == row
    return frame[chosen & frame["why"].isna()] if measured else frame[chosen]


def variant_names(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What variants are called: ``Cropr, R=8, LLF``; with their own name behind it where that would name several."""
    found = {UNPRUNED: UNPRUNED}
    for name, prune in variants.items():
        fusion = {"none": "", "llf": ", LLF"}.get(str(prune["fusion"]), f", {prune['fusion']}")
        schedule = Schedule.from_config(prune["schedule"]).describe()
        found[name] = f"{style.name(str(prune['reducer']))}, {schedule}{fusion}"
    texts = list(found.values())
    return {
        name: f"{text} ({name.replace('_', ' ')})" if texts.count(text) > 1 else text for name, text in found.items()
    }


def distinct(frame: pd.DataFrame, column: str) -> Sequence[Any]:
    """Values of a column in the order in which they appear."""
    return list(dict.fromkeys(frame[column])) if column in frame else []


def _line(row: str, label: str, record: Record, cell: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    tokens = cell.get("tokens")
    places = [str(cell[axis]) for axis in _AXES if axis in cell]
    line: dict[str, Any] = {
        "cell": "/".join([row, *places, *([] if isinstance(tokens, list) or tokens is None else [str(tokens)])]),
        "row": row,
        "label": label,
        "model": record["spec"]["model"]["name"],
        "image_size": record["spec"]["image_size"],
        **{axis: cell.get(axis) for axis in _AXES},
        "name": names.get(str(cell.get("variant")), cell.get("variant")),
        "tokens": f"{tokens[0]} to {min(tokens)}" if isinstance(tokens, list) else tokens,
        "why": cell.get("unsupported"),
    }
    metrics = dict(cell.get("metrics", {}))
    line["fitted"] = metrics.pop("batch_size", cell.get("batch_size"))
    metrics |= {f"{name[:-2]}_ms": 1000 * metrics[name] for name in ("block_s", "total_s") if name in metrics}
    if isinstance(cell.get("seconds"), dict):  # a profile: by category
        metrics |= {f"{category}_ms": 1000 * seconds for category, seconds in cell["seconds"].items()}
    return line | _numbers(metrics)


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics as ``<quantity>.<kind>``; spreads and what is given in other units are left out."""
    found = {}
    for name, value in metrics.items():
        stem, _, ending = name.rpartition("_")
        if ending == "iqr" or name in _SKIPPED:
            continue
        scale = 100 if name in _PERCENT else 1
        if name == "bound":
            found["speedup.bound"] = value
        elif ending in ("low", "high"):
            found[f"{stem}.{ending}"] = value
        else:
            found[f"{name}.{'predicted' if name in _FORMULA else 'measured'}"] = scale * value
    if "speedup_low" in metrics and "bound" in metrics:
        for end in ("low", "high"):
            found[f"share_of_bound.{end}"] = 100 * metrics[f"speedup_{end}"] / metrics["bound"]
    return found
