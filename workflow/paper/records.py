"""From the files of a scale to DataFrames: manifests, records, published numbers, pruning maps.

Every function takes the name of an artefact and ``results``, the folder of a scale (``results/laptop``). A relative
folder is looked for in the working directory and in its parents, so that a notebook opened in ``notebooks/`` finds it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cropr.records import RECORD, read_record

REPOSITORY = Path(__file__).resolve().parents[2]
FACTS = ("row", "name", "label", "reducer", "fusion", "schedule", "pool", "image_size", "aux_weight", "options")
"""Columns that say what a row is."""
SPEED = (
    "round", "device", "base_images_per_s", "images_per_s", "gmacs", "mac_ratio", "mac_ratio_whole",
    "speedup", "speedup_over_mac_ratio", "speedup_whole",
)  # fmt: skip
"""Columns of speed that are there even if nothing was measured."""
SCORING = (
    "entropy", "attention_on_object", "object_share", "auc_sum", "auc_softmax", "recall_sum", "recall_softmax",
    "aux_top1",
)  # fmt: skip
"""Columns of blocks that say what a Cropr module sees."""
_TEXT = (str, type(None))
_MANIFEST: dict[str, Any] = {
    **dict.fromkeys(("artefact", "scale", "results"), str), **dict.fromkeys(("seeds", "rows"), list), "metrics": dict,
}  # fmt: skip
_ROW: dict[str, Any] = {
    **dict.fromkeys(set(FACTS) - {"name"}, object), "row": str, "label": str, "records": list,
    **dict.fromkeys(("fusion", "schedule", "paper_schedule", "why", "bench", "maps"), _TEXT),
}  # fmt: skip
"""What a manifest and its rows hold."""
PUBLISHED = ("row", "quantity", "value", "source", "confidence")


class Markdown(str):
    """Text that a notebook renders."""

    def _repr_markdown_(self) -> str:
        return str(self)


def find_results(results: str | Path) -> Path:
    """The folder of a scale.

    Raises:
        FileNotFoundError: neither the working directory nor a parent has it.
    """
    results = Path(results)
    for root in [Path.cwd(), *Path.cwd().parents]:
        if (root / results).is_dir():
            return root / results
    raise FileNotFoundError(f"{results}: no such folder under {Path.cwd()} or above; make it: snakemake --cores all")


def load_manifest(artefact: str, results: str | Path) -> dict[str, Any]:
    """What the workflow knows of an artefact: title, question, scale, seeds, rows.

    Each row gets a ``name``: its label, followed by schedule and fusion if several rows share the label. ``paper_name``
    is the same with the schedule of the paper, where small models are trained with another.

    Raises:
        FileNotFoundError: the workflow has not written it.
    """
    path = find_results(results) / "manifests" / f"{artefact}.json"
    if not path.is_file():
        command = f"snakemake --cores all {artefact} --config scale={path.parts[-3]}"
        raise FileNotFoundError(f"{path}: no manifest; make it with: {command}")
    with _expected(path):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _require(manifest, _MANIFEST)
        for row in manifest["rows"]:
            _require(row, _ROW)
        labels = [row["label"] for row in manifest["rows"]]
        for row in manifest["rows"]:
            row["paper_schedule"] = row["paper_schedule"] or row["schedule"]
            for name, schedule in (("name", row["schedule"]), ("paper_name", row["paper_schedule"])):
                twice = schedule and labels.count(row["label"]) > 1
                fusion = f" + {row['fusion'].upper()}" if twice and row["fusion"] != "none" else ""
                row[name] = row["label"] + (f", {schedule}{fusion}" if twice else "")
    return manifest


def load_records(artefact: str, results: str | Path, rows: Collection[str] | None = None) -> pd.DataFrame:
    """Training runs: one line per row and seed; of these ``rows`` alone, if given.

    Returns:
        What the row is (``FACTS``), ``seed``, every metric of the record, ``tpr`` (patches pruned, percent), where the
        truth is known ``kept_on_object`` and ``object_kept`` after the last module (see ``load_blocks``), ``record``,
        its path, and ``per_image``, the file with the results of each image or None.

    Raises:
        FileNotFoundError: a record is missing; with the command that makes it.
    """
    manifest, lines = load_manifest(artefact, results), []
    for row in _ran(manifest, rows):
        for path in row["records"]:
            with _reading(manifest, path, results) as record:
                metrics = {"tpr": _pruned_share(record), **record["metrics"]}
                if relevance := record["series"].get("relevance"):
                    metrics |= {name: relevance[-1][name] for name in ("kept_on_object", "object_kept")}
                images = _path(manifest, path, results).with_name(record.get("per_image", RECORD))
                there = images.name != RECORD and images.is_file()
                files = {"record": path, "per_image": relpath(images) if there else None}
                lines.append({**_facts(row), "seed": record["seed"], **metrics, **files})
    return pd.DataFrame(lines, columns=None if lines else [*FACTS, "seed", "record", "per_image"])


def load_blocks(artefact: str, results: str | Path) -> pd.DataFrame:
    """Training runs, block by block: one line per row, seed and block (0 is the input).

    Returns:
        What the row is, ``seed``, ``block``, ``tokens`` after it; where the truth is known ``kept_on_object`` and
        ``object_kept``: kept patches that lie on the object, the object's patches that are kept (percent); and
        ``SCORING`` of the Cropr module that follows the block (``cropr.tasks.scoring``), NaN where there is none.
    """
    manifest, lines = load_manifest(artefact, results), []
    for row in _ran(manifest):
        for path in row["records"]:
            with _reading(manifest, path, results) as record:
                known: dict[int, dict[str, float]] = {}
                for entry in [*record["series"].get("relevance", []), *record["series"].get("scoring", [])]:
                    known.setdefault(entry["block"], {}).update(entry)
                for block, tokens in enumerate(record.get("tokens", ())):
                    line = {**_facts(row), "seed": record["seed"], "block": block, "tokens": tokens}
                    lines.append({**line, **dict.fromkeys(SCORING, math.nan), **known.get(block, {})})
    return pd.DataFrame(lines)


def load_speed(artefact: str, results: str | Path, partial: bool = False) -> pd.DataFrame:
    """Measurements of speed: one line per row and round; with ``partial``, of the rows whose record is there.

    Returns:
        What the row is (``schedule`` is that of the timed model), ``round``,
        ``base_seconds`` (unpruned), ``seconds``, ``speedup`` of that round,
        ``speedup_over_mac_ratio`` (percent), ``speedup_whole`` for models with heads, and the record's other metrics,
        the same in all rounds: ``mac_ratio``, ``images_per_s``, ``batch_size``, ...
    """
    manifest, parts = load_manifest(artefact, results), []
    for row in _ran(manifest):
        if row["bench"] is None or (partial and not _there(manifest, row["bench"], results)):
            continue
        with _reading(manifest, row["bench"], results) as record:
            if "unsupported" in record:  # this device cannot run it; ``not_run`` gives the reason
                continue
            series, metrics = pd.DataFrame(record["series"]), record["metrics"]
            ratios = {"speedup": series["base_seconds"] / series["seconds"]}
            ratios["speedup_over_mac_ratio"] = 100 * ratios["speedup"] / metrics["mac_ratio"]
            if "heads_seconds" in series:
                whole = series[["base_seconds", "seconds"]].add(series["heads_seconds"], axis=0)
                ratios["speedup_whole"] = whole["base_seconds"] / whole["seconds"]
            constant = {name: value for name, value in metrics.items() if not name.startswith("speedup")}
            facts = _facts(row, paper=True) | {"round": series.index, "device": _device(record)}
            parts.append(series.assign(**ratios, **constant, **facts)[[*facts, *series, *ratios, *constant]])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*FACTS, *SPEED])


def load_pruned_after(artefact: str, results: str | Path) -> dict[str, pd.DataFrame]:
    """When each patch of each validation image was pruned, by the row's name.

    Returns:
        For each row with such results a frame with a line per seed and image (its index) and a column per patch: the
        block after which the patch was pruned, or went into the token of another; NaN for never.
    """
    found: dict[str, list[pd.DataFrame]] = {}
    for line in load_records(artefact, results).dropna(subset="per_image").itertuples():
        with np.load(str(line.per_image), allow_pickle=False) as file:
            if "pruned_after" not in file:
                continue
            index = pd.MultiIndex.from_product([[line.seed], file["image"].tolist()], names=["seed", "image"])
            after = file["pruned_after"].astype(np.float32)
        found.setdefault(str(line.name), []).append(pd.DataFrame(after, index=index).replace(0, np.nan))
    return {name: pd.concat(parts) for name, parts in found.items()}


def load_cells(artefact: str, results: str | Path) -> pd.DataFrame:
    """Microbenchmarks: one line per row and cell, settings and metrics as columns.

    Returns:
        ``row``, ``label``, ``device``, the cell's settings, its metrics (NaN where it did not run), and
        ``unsupported``, the reason for which it did not run, or None. ``batch_size`` is the one asked for and
        ``fitted_batch_size`` the one that memory allowed. A profile has its parts as ``<part>_s``.
    """
    cells = _cells(artefact, results)
    frame = pd.DataFrame([{**facts, **_settings(cell), **_metrics(cell)} for facts, cell in cells])
    return frame.assign(unsupported=pd.Series([cell.get("unsupported") for _, cell in cells], dtype=object))


def load_rounds(artefact: str, results: str | Path) -> pd.DataFrame:
    """Microbenchmarks: one line per row, cell and round.

    Returns:
        As ``load_cells`` without metrics, and ``round`` with every list of the cell that has a number per round.
    """
    parts = []
    for facts, cell in _cells(artefact, results):
        series = {k: v for k, v in cell.items() if isinstance(v, list) and k.endswith("seconds")}
        settings = _settings(cell)
        frame = pd.DataFrame(series or {"seconds": [], "base_seconds": []}).rename_axis("round").reset_index()
        parts.append(frame.assign(**facts, **settings)[list(dict.fromkeys([*facts, *settings, *frame]))])
    return pd.concat(parts, ignore_index=True)


def load_published(artefact: str, results: str | Path | None = None) -> pd.DataFrame:
    """Published numbers of ``config/published/<artefact>.csv``: row, quantity, value, source, confidence.

    Args:
        artefact: without such a file the frame is empty.
        results: if given, name, label, reducer, fusion and the paper's schedule say what each row is.

    Raises:
        ValueError: a value is no number, or is given twice.
    """
    path = REPOSITORY / "config" / "published" / f"{artefact}.csv"
    if not path.is_file():
        return pd.DataFrame(columns=[*PUBLISHED])
    table = pd.read_csv(path, comment="#")[[*PUBLISHED]]
    table["value"] = pd.to_numeric(table["value"], errors="coerce")
    wrong = table[table["value"].isna() | table.duplicated(["row", "quantity"])]
    if len(wrong):
        raise ValueError(f"{path}: {wrong['row'].iloc[0]}, {wrong['quantity'].iloc[0]}: give each quantity one number")
    if results is not None:
        facts = pd.DataFrame([_facts(row, paper=True) for row in load_manifest(artefact, results)["rows"]])
        table = table.merge(facts[[*FACTS[:6]]], on="row")
    return table


def load_maps(artefact: str, results: str | Path) -> dict[str, dict[str, Any]]:
    """Arrays that ``python -m cropr show`` saved, by the row's name.

    Returns:
        For each row ``images`` and ``map``, uint8 [n, H, W, 3]; ``pruned_after``, int64 [n, patches], 0 = never;
        ``grid``, ``depth``; ``truth`` and ``prediction`` as pictures, or ``truth_text`` and ``prediction_text``.
    """
    manifest, maps = load_manifest(artefact, results), {}
    for row in _ran(manifest):
        if row["maps"]:
            with np.load(_path(manifest, row["maps"], results), allow_pickle=False) as file:
                maps[row["name"]] = {"reducer": row["reducer"], **file}
    return maps


def not_run(artefact: str, results: str | Path) -> Markdown:
    """One sentence that names the rows that have not run, and why; empty if all have run."""
    reasons: dict[str, list[str]] = {}
    manifest = load_manifest(artefact, results)
    for row in manifest["rows"]:
        if row["why"] is not None:
            reasons.setdefault(row["why"], []).append(row["name"])
        elif row["bench"]:
            with _reading(manifest, row["bench"], results) as record:
                if why := record.get("unsupported"):
                    reasons.setdefault(why, []).append(f"speed of {row['name']}")
    parts = [f"{', '.join(names)} ({why})" for why, names in reasons.items()]
    return Markdown(f"Rows that have not run: {'; '.join(parts)}." if parts else "")


def setting(artefact: str, results: str | Path) -> Markdown:
    """What was measured, from records: scale, seeds, the trained model, the timed model and its device."""
    manifest = load_manifest(artefact, results)
    lines = [f"Scale `{manifest['scale']}`, seeds {', '.join(map(str, manifest['seeds']))}."]
    rows = _ran(manifest)
    if path := next((row["records"][0] for row in rows if row["records"]), None):
        with _reading(manifest, path, results) as record:
            spec, metrics = record["spec"], record["metrics"]
            seen = f"{metrics['images']} training images seen (epochs: {spec['recipe']['epochs']:g})"
            lines.append(f"Accuracy: {_model(spec)}, {spec['data']['image_size']} px, {seen}, "
                         f"{metrics['val_images']} validation images.")  # fmt: skip
    if path := next((p for row in rows if (p := row["bench"]) and _there(manifest, p, results)), None):
        with _reading(manifest, path, results) as record:
            if record["kind"] == "bench":
                spec = record["spec"]
                lines.append(f"Speed: {_model(spec)}, {spec['image_size']} px, batch {spec['batch_size']}, "
                             f"{spec['precision']}, {spec['rounds']} rounds.")  # fmt: skip
            lines.append(f"Device of the speed measurements: {_device(record)}.")
    return Markdown("  \n".join(lines))


def rerun(artefact: str, results: str | Path) -> Markdown:
    """The command that makes this artefact again."""
    manifest = load_manifest(artefact, results)
    seeds = manifest["seeds"]
    first = seeds == list(range(len(seeds)))
    every = {len(row["records"]) for row in _ran(manifest)} == {len(seeds)}  # the call named seeds, or all rows repeat
    chosen = f" seeds={len(seeds) if first else ','.join(map(str, seeds))}" if every and seeds != [0] else ""
    command = f"snakemake --cores all {artefact} --config scale={manifest['scale']}{chosen}"
    return Markdown(f"```sh\n{command}\n```")


@contextmanager
def _expected(path: str | Path) -> Iterator[None]:
    """Errors of a body that reads a file's values become a ValueError that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: lacks a value or has one of another form ({found}); delete it, run it again"
        ) from error


def _require(values: dict[str, Any], kinds: dict[str, Any]) -> None:
    for key, kind in kinds.items():
        if not isinstance(values[key], kind):
            raise TypeError(f"{key} = {values[key]!r}")


def _ran(manifest: dict[str, Any], names: Collection[str] | None = None) -> list[dict[str, Any]]:
    rows = (row for row in manifest["rows"] if names is None or row["row"] in names)
    return [row for row in rows if row["why"] is None]


def _facts(row: dict[str, Any], paper: bool = False) -> dict[str, Any]:
    """What a row is, with the schedule of the trained model or that of the paper's model."""
    chosen = row | {"name": row["paper_name"], "schedule": row["paper_schedule"]} if paper else row
    return {name: chosen[name] for name in FACTS}


def _there(manifest: dict[str, Any], path: str, results: str | Path) -> bool:
    return (find_results(results) / Path(path).relative_to(manifest["results"])).is_file()


def _path(manifest: dict[str, Any], path: str, results: str | Path) -> Path:
    """A file that a manifest names. The folder of a scale may have been moved since."""
    found = find_results(results) / Path(path).relative_to(manifest["results"])
    if not _there(manifest, path, results):
        command = f"snakemake --cores all {path} --config scale={manifest['scale']}"
        raise FileNotFoundError(f"{path}: no such file; make it with: {command}")
    return found


@contextmanager
def _reading(manifest: dict[str, Any], path: str, results: str | Path) -> Iterator[dict[str, Any]]:
    """The record that a manifest names; for the body that reads its values, see ``_expected``."""
    with _expected(path):
        yield read_record(_path(manifest, path, results))


def _cells(artefact: str, results: str | Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    manifest, found = load_manifest(artefact, results), []
    for row in _ran(manifest):
        with _reading(manifest, row["bench"], results) as record:
            facts = {"row": row["row"], "label": row["label"], "device": _device(record)}
            for cell in record["cells"]:
                _metrics(cell), _settings(cell)  # errors here name the file
                found.append((facts, cell))
    return found


def _settings(cell: dict[str, Any]) -> dict[str, Any]:
    """What is one value: neither metrics nor a list over rounds or blocks."""
    return {key: value for key, value in cell.items() if not isinstance(value, list | dict)}


def _metrics(cell: dict[str, Any]) -> dict[str, float]:
    """A cell's metrics; of a profile, its parts too. The batch size that fitted does not hide the one asked for."""
    metrics = {"fitted_batch_size" if k == "batch_size" else k: v for k, v in cell.get("metrics", {}).items()}
    parts = cell.get("seconds")
    return metrics | ({f"{part}_s": value for part, value in parts.items()} if isinstance(parts, dict) else {})


def _device(record: dict[str, Any]) -> str:
    about = record["provenance"]
    return f"{about['cpu']}, {about['threads']} threads" if about["device"] == "cpu" else str(about["device"])


def _model(spec: dict[str, Any]) -> str:
    name, given = spec["model"]["name"], spec["model"].get("args", {})
    shape = [f"{words} {given[key]}" for key, words in (("depth", "depth"), ("embed_dim", "width")) if key in given]
    return f"`{name}`" + (f" ({', '.join(shape)})" if shape else "")


def _pruned_share(record: dict[str, Any]) -> float:
    """Patches pruned anywhere over all patches, percent (paper, section 4); NaN where patches cannot be counted.

    Prefix tokens are never pruned, so that the difference of two token counts is one of patches.
    """
    spec, tokens = record["spec"], record.get("tokens")
    side = spec["model"].get("args", {}).get("patch_size")
    if side is None and (match := re.search(r"patch(\d+)", spec["model"]["name"])):
        side = int(match[1])
    if not tokens or not side:
        return float("nan")
    return 100 * (tokens[0] - min(tokens)) / (spec["data"]["image_size"] // side) ** 2
