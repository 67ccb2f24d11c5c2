"""What rows are called: label, schedule and fusion, with the schedule of the very number that stands beside it.

One row of a table has up to three schedules. Its accuracy is that of this scale's model, its speed that of the model
that was timed (the paper's at most scales), and the published numbers are the paper's: ``R=48 @ 1`` on 64 patches is
not ``R=8`` on 196. Every function here is told which of them is meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cropr.pruning.schedule import Schedule
from workflow.paper.load import Artefact

Side = Literal["accuracy", "speed", "paper"]
"""Whose schedule: of the trained model, of the timed one, of the published number."""
_FUSIONS = {"llf": "LLF", "none": "no LLF"}


def schedule_name(artefact: Artefact, row: str, side: Side = "accuracy") -> str | None:
    """``R=8``; None where nothing says it: a row that was not timed, a paper's row at a scale with other schedules."""
    columns = artefact.rows[row].columns
    if side == "speed":
        record = artefact.benches.get(row)
        schedule = record["spec"].get("prune", {}).get("schedule") if record else None
        return None if schedule is None else Schedule.from_config(schedule).describe()
    if side == "paper":
        return columns.get("paper_schedule", columns.get("schedule") if artefact.manifest.scale == "paper" else None)
    return columns.get("schedule")


def setting_name(artefact: Artefact, row: str, side: Side = "accuracy") -> str:
    """Schedule and fusion of a row: ``R=8, LLF``; ``unpruned`` and the image size where nothing is pruned."""
    columns = artefact.rows[row].columns
    if artefact.reducer(row) == "none":
        size = columns.get("image_size")
        if side == "speed":
            spec = artefact.benches.get(row, {}).get("spec", {})
            size = spec.get("pruned_image_size") or spec.get("image_size")
        return "unpruned" if size is None or side == "paper" else f"unpruned, {size} px"
    fusion = columns.get("fusion")
    parts = (schedule_name(artefact, row, side), _FUSIONS.get(str(fusion), fusion))
    return ", ".join(str(part) for part in parts if part is not None)


def row_names(artefact: Artefact, side: Side = "accuracy") -> dict[str, str]:
    """Labels of all rows, with schedule and fusion added where a label alone would name several rows."""
    return {
        name: f"{row.label} ({setting_name(artefact, name, side)})" if name in _ambiguous(artefact) else row.label
        for name, row in artefact.rows.items()
    }


def short_names(artefact: Artefact, side: Side) -> dict[str, str]:
    """Labels beside points, with the schedule where several rows share a label; fusion is left to how it is drawn."""
    names = {}
    for name, row in artefact.rows.items():
        schedule = schedule_name(artefact, name, side) if name in _ambiguous(artefact) else None
        names[name] = f"{row.label} {schedule}" if schedule else row.label
    return names


def headings(artefact: Artefact) -> dict[str, str]:
    """What a group of rows with the same schedule and fusion stands under, by row.

    ``R=8, with Last Layer Fusion``, or ``accuracy R=48 @ 1; speed and paper R=8; with Last Layer Fusion``. Rows that
    were not timed stand with those that were.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, row in artefact.rows.items():
        pruned = row.reducer != "none"
        groups.setdefault((row.columns.get("schedule"), row.columns.get("fusion")) if pruned else (), []).append(name)
    texts: dict[str, str] = {}
    for key, names in groups.items():
        if not key:
            texts |= dict.fromkeys(names, "Unpruned")
            continue
        sides: tuple[Side, ...] = ("accuracy", "speed", "paper")
        found = {side: _or([schedule_name(artefact, name, side) for name in names]) for side in sides}
        fusion = {"llf": "with Last Layer Fusion", "none": "without fusion"}.get(str(key[1]), f"with {key[1]}")
        joined = _joined(found)
        texts |= dict.fromkeys(names, f"{joined}{'; ' if ';' in joined else ', '}{fusion}")
    return texts


def schedules(artefact: Artefact) -> list[str]:
    """Pairs of schedules of a row's accuracy and its speed, where the two differ: ``accuracy R=48 @ 1; speed R=8``."""
    pairs: dict[str, None] = {}
    for name in artefact.rows:
        found = {side: schedule_name(artefact, name, side) for side in ("accuracy", "speed")}
        if artefact.reducer(name) != "none" and None not in found.values() and len(set(found.values())) > 1:
            pairs[_joined(found)] = None
    return list(pairs)


def bench_model(artefact: Artefact) -> str:
    """timm's name of the model whose throughput was measured, without its weights' tag."""
    specs = [record["spec"] for record in artefact.benches.values()]
    names = {str(spec["model"]["name"]).partition(".")[0] for spec in specs}
    return ", ".join(sorted(names)) or "the model"


def _ambiguous(artefact: Artefact) -> set[str]:
    labels = [row.label for row in artefact.rows.values()]
    return {name for name, row in artefact.rows.items() if labels.count(row.label) > 1}


def _joined(found: dict[Side, str | None] | dict[str, str | None]) -> str:
    """``R=8`` where all known sides agree, else ``accuracy R=48 @ 1; speed and paper R=8``."""
    sides: dict[str, list[str]] = {}
    for side, schedule in found.items():
        if schedule is not None:
            sides.setdefault(schedule, []).append(side)
    if len(sides) == 1:
        return next(iter(sides))
    return "; ".join(f"{' and '.join(names)} {schedule}" for schedule, names in sides.items())


def _or(names: Sequence[str | None]) -> str | None:
    """The schedules of several rows, each once."""
    return " or ".join(dict.fromkeys(name for name in names if name is not None)) or None
