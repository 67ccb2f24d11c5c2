"""Records as the workflow leaves them, with made-up numbers, for tests of the report and the notebooks.

    results = write_results(tmp_path, "imagenet_methods", seeds=3)

Rows are those of the artefact's YAML. Numbers come from a fixed seed; they resemble no run.
"""

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import yaml
from IPython.display import display

from cropr.pruning.methods import REDUCERS
from cropr.records import write_record
from cropr.tasks import TASKS
from workflow.paper.resolver import Row

EXPERIMENTS = Path(__file__).parents[2] / "config" / "experiments"
TOKENS = [17, 13, 9, 9, 17]
BASE = dict.fromkeys(("ablations", "scoring", "similarity"), "cropr")
BASE |= {"reactivation": "unpruned", "relevance": "random"}


def run_cells(name: str, results: Path) -> None:
    """Run a notebook's cells in this process, without a kernel."""
    scope: dict[str, Any] = {"display": display}
    with mpl.rc_context({"backend": "agg"}):
        for cell in json.loads((EXPERIMENTS.parents[1] / "notebooks" / f"{name}.ipynb").read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec(f"results = {str(results)!r}" if "tags" in cell["metadata"] else "".join(cell["source"]), scope)


def row_configs(artefact: str) -> list[dict[str, Any]]:
    """Rows of the YAML, with ``use`` resolved; a list of schedules gives a row each."""
    rows = yaml.safe_load((EXPERIMENTS / f"{artefact}.yaml").read_text())["rows"]
    found = []
    for row in rows:
        if isinstance(schedules := row.get("schedule"), list):
            found += [{"fusion": "none", **row, "row": f"{row['row']}_{name}", "schedule": name} for name in schedules]
            continue
        if "use" in row:
            other, _, name = row["use"].partition("/")
            row = {**next(one for one in row_configs(other) if one["row"] == name), **row}
        found.append({"reducer": "none", "fusion": "none", **row})
    return found


def write_results(root: Path, artefact: str, seeds: int = 3, **top: list[float]) -> Path:
    """Write a manifest, its records and maps below ``root``. ``top``: by row, the first metric of each seed."""
    config = yaml.safe_load((EXPERIMENTS / f"{artefact}.yaml").read_text())
    for other in config.get("reads", ()):
        write_results(root, other, seeds)
    if config["needs"] == ["microbench"]:
        return write_microbench(root, artefact, {row["row"]: variants(row) for row in config["rows"]})
    task = config.get("task", "classification")
    rows = [_row(root, one, task, range(seeds), config, top) for one in row_configs(artefact)]
    manifest = {
        "artefact": artefact, "title": artefact, "question": "Which?", "section": "Made up", "order": 1, "task": task,
        "scale": "ci", "seeds": list(range(seeds)), "results": "results/ci", "baseline": BASE.get(artefact, "none"),
        "published": None, "paper_model": "ViT-L/16", "metrics": dict(TASKS[task].metrics), "rows": rows,
    }  # fmt: skip
    (root / "manifests").mkdir(parents=True, exist_ok=True)
    (root / "manifests" / f"{artefact}.json").write_text(json.dumps(manifest))
    return root


def variants(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells of a sweep: each variant, and the unpruned model, with eight rounds."""
    rng, cells = np.random.default_rng(zlib.crc32(row["row"].encode())), []
    for name in ("unpruned", *row["settings"]["variants"]):
        seconds = (rng.uniform(0.9, 1.1, 8) / (1.0 if name in ("unpruned", "control") else 1.6)).tolist()
        metrics = {"images_per_s": 4.0, "gmacs": 6.0, "mac_ratio": 1.0 if name in ("unpruned", "control") else 1.7}
        plain = {"variant": name, "precision": "fp32", "attention": "auto", "batch_size": 4, "metrics": metrics}
        cells.append({**plain, "seconds": seconds, "base_seconds": rng.uniform(0.9, 1.1, 8).tolist()})
    return cells


def write_microbench(root: Path, artefact: str, made: dict[str, list[dict[str, Any]]]) -> Path:
    """Write the manifest and the records of a microbenchmark below ``root``, from the cells of each row."""
    about, rows = {"device": "cpu", "cpu": "a processor", "threads": 2}, []
    for row, cells in made.items():
        record = {"kind": "microbench", "cells": cells, "provenance": about}
        write_record(root / "microbench" / artefact / row / "record.json", record)
        bench = f"results/ci/microbench/{artefact}/{row}/record.json"
        rows.append(asdict(Row(row=row, label=row.upper(), bench=bench)))
    about = {"artefact": artefact, "title": artefact, "question": "Which?", "section": "Made up", "order": 2}
    about |= {"metrics": {}, "scale": "ci", "seeds": [0], "results": "results/ci", "rows": rows}
    (root / "manifests").mkdir(parents=True, exist_ok=True)
    (root / "manifests" / f"{artefact}.json").write_text(json.dumps(about))
    return root


def _row(
    root: Path, row: dict[str, Any], task: str, seeds: range, config: dict[str, Any], top: dict[str, list[float]]
) -> dict[str, Any]:
    name, pruned, runs = row["row"], row["reducer"] != "none", row["reducer"] in REDUCERS
    entry = {
        "row": name, "label": row["label"], "reducer": row["reducer"], "fusion": row["fusion"], "pool": "avg",
        "schedule": str(row.get("schedule", "none")), "image_size": 32, "aux_weight": 1.0, "options": "",
        "paper_schedule": None, "why": None if runs else "not implemented yet", "run": None, "records": [],
        "bench": None, "maps": None,
    }  # fmt: skip
    if not runs:
        return entry
    for seed in seeds:
        record = train_record(name, task, seed, pruned)
        if name in top:
            record["metrics"][next(iter(TASKS[task].metrics))] = top[name][seed]
        folder = root / "runs" / name / f"seed{seed}"
        if "same patches" in config["title"]:
            record["per_image"] = "per_image.npz"
            folder.mkdir(parents=True, exist_ok=True)
            after = np.random.default_rng([zlib.crc32(name.encode()), seed]).integers(0, 4, (5, 16)).astype(np.int8)
            after[:, 0] = 0
            np.savez(folder / "per_image.npz", image=np.arange(5), pruned_after=after)
        write_record(folder / "record.json", record)
        entry["records"].append(f"results/ci/runs/{name}/seed{seed}/record.json")
    if "bench" in config["needs"]:
        write_record(root / "bench" / name / "record.json", bench_record(name, task))
        entry["bench"] = f"results/ci/bench/{name}/record.json"
    if "maps" in config["needs"]:
        write_maps(root / "maps" / f"{name}.npz", task)
        entry["maps"] = f"results/ci/maps/{name}.npz"
    return entry


def train_record(name: str, task: str, seed: int, pruned: bool = True) -> dict[str, Any]:
    """A record of ``python -m cropr train``."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    metrics = {metric: round(rng.uniform(50, 90), 3) for metric in TASKS[task].metrics}
    metrics |= {"loss": round(rng.uniform(0.1, 1), 4), "step_ms": round(rng.uniform(20, 40), 2), "images": 96}
    metrics |= {"val_images": 48, "parameters": 78_398, "parameters_training_only": 19_796, "box_ap50": 71.25}
    metrics |= {"gmacs": round(rng.uniform(1, 3), 2)}
    relevance = [{"block": b, "kept_on_object": 20.0 + b, "object_kept": 100.0 - 9 * b} for b in range(3)]
    series: dict[str, Any] = {"relevance": relevance}
    if "random" not in name:
        figures = {"entropy": 0.9, "auc_sum": 0.8, "recall_sum": 90.0, "aux_top1": 40.0}
        series["scoring"] = [{"block": b, **figures} for b in (1, 2)]
    spec = {"model": {"name": "vit_tiny_patch8_224", "args": {"depth": 4}}, "data": {"image_size": 32}}
    return {
        "id": name, "kind": "train", "seed": seed, "metrics": metrics, "series": series,
        "tokens": TOKENS if pruned else [17] * 5, "provenance": {}, "spec": {**spec, "recipe": {"epochs": 1}},
    }  # fmt: skip


def bench_record(name: str, task: str, rounds: int = 7) -> dict[str, Any]:
    """A record of ``python -m cropr bench``."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    series = {"base_seconds": rng.uniform(0.9, 1.1, rounds).tolist(), "seconds": rng.uniform(0.5, 0.7, rounds).tolist()}
    metrics = {"mac_ratio": 1.75, "images_per_s": 13.25, "base_images_per_s": 8.0}
    metrics |= {"gmacs": 34.67, "gmacs_linear": 30.5, "batch_size": 8}
    if task == "detection":
        series["heads_seconds"], metrics["mac_ratio_whole"] = [0.4] * rounds, 1.4
    spec = {"model": {"name": "vit_large_patch16_224"}, "image_size": 224, "batch_size": 8, "precision": "fp32"}
    about = {"cpu": "Made-up CPU", "threads": 2, "device": "cpu"}
    record = {"kind": "bench", "metrics": metrics, "series": series, "provenance": about}
    return {**record, "spec": {**spec, "rounds": rounds}}


def write_maps(path: Path, task: str) -> None:
    """Arrays of ``python -m cropr show``."""
    pictures = np.zeros((2, 32, 32, 3), np.uint8)
    arrays = {"images": pictures, "map": pictures, "pruned_after": np.tile(np.arange(16) % 3, (2, 1)), "task": task}
    arrays |= {"truth_text": np.array(["a", "b"]), "prediction_text": np.array(["a", "a"]), "grid": np.array([4, 4])}
    if task != "classification":
        arrays |= {"truth": pictures, "prediction": pictures}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, depth=4, **arrays)
