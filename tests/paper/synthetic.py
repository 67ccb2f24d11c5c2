"""Records as the workflow would leave them, with made-up numbers, for tests of the report and the notebooks.

    manifests = write_results(tmp_path, scale="laptop", seeds=3)

Accuracies follow ``TOP1`` plus noise of a fixed seed; they resemble no run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from cropr.data.scenes import CLASSES, Scene, compose, object_patches
from cropr.pruning.schedule import Schedule, trace
from cropr.records import write_record
from cropr.specs import PruneSpec, ScenesSpec
from cropr.training.specs import TrainSpec
from workflow.paper import claims
from workflow.paper.grid import Grid, load_grid

CONFIG = Path(__file__).parents[2] / "config"
TOP1 = {"none": 91.5, "cropr": 90.4, "attn_topk": 89.2, "random": 86.5, "variance": 84.8, "non_salient": 71.3}
FOCUS = {"none": 1.0, "cropr": 4.0, "attn_topk": 3.0, "random": 1.0, "variance": 1.3, "non_salient": 0.4}
"""How much more readily a method keeps a patch of the object than another."""
METRICS = {"classification": ("top1",), "segmentation": ("miou", "macc"), "detection": ("box_ap", "mask_ap")}
"""Metrics of a record by task; all of one record have the same value."""
ON_OBJECT = 14.0
"""Percent of all patches."""


def write_results(root: Path, scale: str = "laptop", seeds: int = 3) -> dict[str, Path]:
    """Write records, maps and manifests below ``root``; returns the manifests by artefact, without the laboratory's."""
    grid = load_grid(CONFIG, scale=scale, seeds=seeds)
    for run, spec in grid.runs.items():
        for seed in grid.seeds:
            write_record(root / grid.record(run, seed), train_record(spec, seed))
    for number, (bench, spec) in enumerate(sorted(grid.benches.items())):
        write_record(root / grid.bench(bench), bench_record(spec.model_dump(mode="json"), spec.digest(), number))
    chosen = [name for name, artefact in grid.artefacts.items() if not any(row.lab for row in artefact.rows)]
    return {name: _write_artefact(root, grid, name) for name in chosen}


def _write_artefact(root: Path, grid: Grid, name: str) -> Path:
    manifest = grid.manifest(name)
    manifest["results"] = str(root / grid.results)
    for row in manifest["rows"]:
        row["records"] = [str(root / file) for file in row["records"]]
        row["bench"] = row["bench"] and str(root / row["bench"])
        if row["maps"]:
            row["maps"] = str(root / row["maps"])
            write_maps(Path(row["maps"]), grid.runs[row["run"]], grid.config.maps)
    path = root / grid.results / "manifests" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest, indent=1))
    return path


def counts(spec: TrainSpec) -> tuple[tuple[int, ...], int]:
    """Patch tokens alive after each block, and patches of the image."""
    patches = (spec.data.image_size // spec.model.args.get("patch_size", 16)) ** 2
    depth = spec.model.args.get("depth", 12)
    return Schedule.from_config(spec.prune.schedule).resolve(patches, depth, spec.prune.fusion == "llf", 1), patches


def train_record(spec: TrainSpec, seed: int, top1: float | None = None) -> dict:
    """A training record; options and fusion shift its accuracy a little, the seed shifts it for all runs alike."""
    rng = np.random.default_rng([seed, int(spec.digest(), 16) % 2**31])
    shared = np.random.default_rng(seed).normal(0, 0.4)
    prune, (alive, patches) = spec.prune, counts(spec)
    if top1 is None:
        shift = -0.7 * (prune.fusion == "none" and prune.reducer != "none") - 0.35 * len(prune.options)
        shift -= 6.0 * (spec.data.image_size < 60) * (prune.reducer == "none" and patches == 49)
        top1 = min(TOP1[prune.reducer] + shift + shared + rng.normal(0, 0.25), 100.0)
    images = spec.data.scenes.val if spec.data.scenes else 1000
    step = 240.0 * (0.45 + 0.55 * np.mean(alive) / patches) if prune.reducer != "none" else 240.0
    return {
        "kind": "train",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "seed": seed,
        "metrics": {
            **dict.fromkeys(METRICS[spec.task], round(top1 * images / 100) * 100 / images),
            "loss": (100 - top1) / 30,
            "images": 20000,
            "val_images": images,
            "step_ms": step * rng.uniform(0.98, 1.02),
            "train_images_per_s": 64 / step * 1000,
            "parameters": 918_000,
            "parameters_training_only": 560_000 if prune.reducer in ("cropr", "non_salient") else 0,
        },
        "tokens": list(trace(alive, patches, 1)),
        "series": {"relevance": _relevance(prune, alive, patches, rng)},
        "provenance": provenance(610.0),
    }


def _relevance(prune: PruneSpec, alive: tuple[int, ...], patches: int, rng: np.random.Generator) -> list[dict]:
    """Shares on the object if its patches are kept more readily than others by the method's factor."""
    entries = [{"block": 0, "kept_on_object": ON_OBJECT, "object_kept": 100.0}]
    for block, (before, now) in enumerate(zip((patches, *alive), alive, strict=False), start=1):
        if now < before:
            kept = now / patches
            there = min(1.0, kept ** (1 / FOCUS[prune.reducer]) * rng.uniform(0.99, 1.01))
            entries.append(
                {"block": block, "kept_on_object": min(100.0, ON_OBJECT * there / kept), "object_kept": 100 * there}
            )
    return entries


def bench_record(spec: dict, digest: str, number: int) -> dict:
    """A throughput record near a bound that follows from schedule and fusion."""
    rng = np.random.default_rng(number)
    stages, fused = "stages" in spec["prune"]["schedule"], spec["prune"]["fusion"] == "llf"
    bound = {(False, True): 1.78, (False, False): 1.91, (True, True): 1.55, (True, False): 1.63}[stages, fused]
    if spec["prune"]["reducer"] == "none":
        bound = 1.75 if spec["pruned_image_size"] else 1.0
    speedup = bound * rng.uniform(0.955, 0.985)
    return {
        "kind": "bench",
        "id": digest,
        "spec": spec,
        "metrics": {
            "base_images_per_s": 2.1,
            "images_per_s": 2.1 * speedup,
            "speedup": speedup,
            "speedup_low": speedup * 0.99,
            "speedup_high": speedup * 1.008,
            "bound": bound,
            "share_of_bound": speedup / bound,
            "base_gmacs": 61.6,
            "gmacs": 61.6 / bound,
            "base_weights_mb": 1217.3,
            "weights_mb": 1217.3 + 0.09,
        },
        "tokens": [197, 188, 180],
        "series": {},
        "provenance": provenance(55.0),
    }


def provenance(wall_s: float) -> dict:
    """As ``cropr.records.provenance`` gives it."""
    return {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "python": "3.11.9",
        "packages": {"torch": "2.14.1", "timm": "1.0.31", "numpy": "2.3.0"},
        "platform": "Linux",
        "device": "cpu",
        "cpu": "An Example Processor",
        "threads": 2,
        "precision": "fp32",
        "started": "2025-01-01T12:00:00+00:00",
        "wall_s": wall_s,
        "peak_memory_mb": 800.0,
        "data_fingerprint": "feedfacefeedface",
    }


def write_maps(path: Path, spec: TrainSpec, images: int) -> None:
    """Maps of real scenes, pruned at random but for the method's preference for the object."""
    scenes = spec.data.scenes or ScenesSpec()
    drawn = [compose(scenes, "val", 7 * i) for i in range(images)]
    masks = np.stack([scene.mask for scene in drawn])
    side = spec.data.image_size // spec.model.args.get("patch_size", 16)
    on = np.stack([object_patches(mask, (side, side)) for mask in masks])
    alive, patches = counts(spec)
    rng = np.random.default_rng(0)
    scores = rng.gumbel(size=on.shape) + on * 4 * np.log(FOCUS[spec.prune.reducer])
    rank = np.argsort(np.argsort(-scores, axis=1), axis=1)
    after = np.zeros(on.shape, np.int64)
    pruning = alive[:-1] if spec.prune.fusion == "llf" else alive
    for block, (before, now) in enumerate(zip((patches, *pruning), pruning, strict=False), start=1):
        after[(rank < before) & (rank >= now)] = block
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        task=np.array(spec.task),
        images=np.stack([scene.image for scene in drawn]),
        pruned_after=after,
        grid=np.array([side, side]),
        depth=np.array(len(alive)),
        masks=masks,
        **ANSWERS[spec.task](drawn, rng, TOP1[spec.prune.reducer] / 100),
    )


DIGITS = [f"digit_{label}" for label in range(CLASSES)]


def _classes(drawn: list[Scene], rng: np.random.Generator, right: float) -> dict:
    """A share of the labels is predicted right, others are one too high."""
    labels = np.array([scene.label for scene in drawn])
    wrong = rng.random(len(drawn)) >= right
    return {"labels": labels, "predictions": (labels + wrong) % CLASSES, "classes": np.array(DIGITS)}


def _label_maps(drawn: list[Scene], rng: np.random.Generator, right: float) -> dict:
    """A share of the pixels is predicted right, others are background."""
    labels = np.stack([scene.semantic for scene in drawn]) - np.uint8(1)
    guess = np.where(rng.random(labels.shape) < right, labels, 0).astype(np.uint8)
    return {"label_maps": labels, "prediction_maps": guess, "classes": np.array(["background", *DIGITS])}


def _objects(drawn: list[Scene], rng: np.random.Generator, right: float) -> dict:
    """A share of the objects is found, all with their very boxes."""
    found = [(index, instance) for index, scene in enumerate(drawn) for instance in scene.instances]
    arrays = {
        "image": np.array([index for index, _ in found]),
        "boxes": np.array([instance.box for _, instance in found], float),
        "classes": np.array([instance.label for _, instance in found]),
        "masks": np.stack([instance.region for _, instance in found]),
    }
    hit = rng.random(len(found)) < right
    predicted = {f"predicted_{name}": array[hit] for name, array in arrays.items()}
    scores = rng.uniform(0.6, 1, int(hit.sum()))
    true = {f"true_{name}": array for name, array in arrays.items()}
    return {**true, **predicted, "predicted_scores": scores, "classes": np.array(DIGITS)}


ANSWERS = {"classification": _classes, "segmentation": _label_maps, "detection": _objects}
"""Truth and predictions as ``workflow.paper.answers`` reads them."""

BENCH = {
    "spec": {
        "model": {"name": "vit_x.tag", "args": {}},
        "prune": {"reducer": "cropr", "schedule": {"constant": {"rate": 12}}},
        "image_size": 224,
        "batch_size": 4,
        "precision": "fp32",
        "rounds": 5,
    }
}


def small_train_record(
    value: float, seed: int, reducer: str, step_ms: float = 100.0, relevance: list | None = None,
    task: str = "classification",
) -> dict:  # fmt: skip
    spec = {
        "task": task,
        "model": {"name": "vit_tiny", "args": {"depth": 4, "global_pool": "avg"}},
        "prune": {"reducer": reducer},
        "data": {"image_size": 32, "num_classes": 10, "scenes": {"train": 1000, "val": 400}},
        "recipe": {"epochs": 1, "batch_size": 8, "precision": "fp32"},
        "init": "random",
    }
    metrics = {"val_images": 400, "images": 1000, "step_ms": step_ms, "parameters_training_only": 1234}
    metrics |= dict.fromkeys(METRICS[task], value)
    return {
        "kind": "train", "id": "x", "spec": spec, "seed": seed, "metrics": metrics, "tokens": [17, 9, 17],
        "series": {"relevance": relevance or []}, "provenance": provenance(61.0),
    }  # fmt: skip


def small_bench_record(speedup: float, images_per_s: float) -> dict:
    metrics = {
        "speedup": speedup, "speedup_low": speedup - 0.02, "speedup_high": speedup + 0.01, "bound": 1.8,
        "images_per_s": images_per_s, "base_images_per_s": 2.0, "weights_mb": 1001.0, "base_weights_mb": 1000.0,
        "gmacs": 30.0, "base_gmacs": 54.0,
    }  # fmt: skip
    series = {"base_seconds": [speedup] * 7, "seconds": [1.0] * 7}
    return {"kind": "bench", "id": "b", "metrics": metrics, "series": series, "provenance": provenance(5.0), **BENCH}


def write_small(root: Path, seeds: int = 2, **changes) -> Path:
    """Four rows with hand-made numbers: unpruned, Cropr, random, and one that does not exist. Returns the manifest.

    Args:
        changes: keys of the manifest to replace.
    """
    curve = [{"block": 0, "kept_on_object": 20.0, "object_kept": 100.0}]
    accuracies = {"none": [90.0, 92.0], "cropr": [89.0, 91.5], "random": [80.0, 83.0]}
    last = {"none": [], "cropr": [{"block": 2, "kept_on_object": 60.0, "object_kept": 90.0}],
            "random": [{"block": 2, "kept_on_object": 20.0, "object_kept": 30.0}]}  # fmt: skip
    rows = []
    task = changes.get("task", "classification")
    for name, values in accuracies.items():
        paths = []
        for seed, value in enumerate(values[:seeds]):
            path = root / "runs" / name / f"seed{seed}" / "record.json"
            write_record(
                path,
                small_train_record(value, seed, name, 80.0 if name == "cropr" else 100.0, curve + last[name], task),
            )
            paths.append(str(path))
        bench = root / "bench" / f"{name}.json"
        if name != "none":
            write_record(bench, small_bench_record(1.7 if name == "cropr" else 1.75, 3.4 if name == "cropr" else 3.5))
        columns = {"reducer": name, "schedule": "R=8", "fusion": "llf", "pool": "avg", "image_size": 32}
        rows.append({"row": name, "label": name.title(), "columns": columns, "available": True, "why": None,
                     "run": "x", "baseline": "none", "records": paths, "maps": None,
                     "bench": None if name == "none" else str(bench)})  # fmt: skip
    rows.append({"row": "tome", "label": "ToMe <new>", "columns": {**columns, "reducer": "tome"},
                 "available": False, "why": "merging is missing", "run": None, "baseline": "none", "records": [],
                 "bench": None, "maps": None})  # fmt: skip
    published, metric = root / "published.csv", METRICS[task][0]
    published.write_text(
        "# a comment\nrow,quantity,value,source,confidence\n"
        f"none,{metric},85.8,Table 1,T\ncropr,{metric},85.3,Table 1,T\n"
        f"tome,{metric},85.0,Table 1,T\ncropr,speedup,1.7,notes,R\nnone,images_per_s,860,Table 1,T\n"
    )
    manifest = {"artefact": "imagenet_methods", "title": "Methods", "scale": "tiny", "seeds": list(range(seeds)),
                "results": str(root / "results"), "published": str(published), "rows": rows}  # fmt: skip
    path = root / "manifest.json"
    path.write_text(json.dumps({**manifest, **changes}))
    return path


DENSE = {
    "ade20k": ("segmentation", ("none", "random", "variance", "attn_topk", "cropr")),
    "reactivation": (
        "segmentation", ("unpruned", "none_pruned", "exit", "concat", "cross", "llf_no_self", "llf"),
    ),
    "coco": ("detection", ("none", "random", "cropr")),
}  # fmt: skip
"""Rows of the artefacts on dense tasks, the first one the baseline."""


def write_dense(root: Path, artefact: str, seeds: int = 3) -> Path:
    """An artefact on segmentation or detection with made-up records. Returns the manifest."""
    task, names = DENSE[artefact]
    rows = []
    for number, name in enumerate(names):
        reducer = {"unpruned": "none"}.get(name, name if artefact != "reactivation" else "cropr")
        fusion = "none" if number == 0 else name if artefact == "reactivation" else "llf"
        paths = []
        for seed in range(seeds):
            record = small_train_record(72.0 - 3 * number + 0.4 * seed * (-1) ** number, seed, reducer, task=task)
            record |= {"tokens": [65] * 9 if number == 0 else [65, 65, 55, 46, 37, 28, 19, 10, 65]}
            record["metrics"]["tpr"] = 0.0 if number == 0 else 86.0
            paths.append(root / "runs" / name / f"seed{seed}" / "record.json")
            write_record(paths[-1], record)
        bench = root / "bench" / f"{name}.json"
        measured = small_bench_record(1.7 - 0.02 * number, 3.4)
        prune = {"reducer": reducer, "schedule": {"constant": {"rate": 40}}}
        write_record(bench, measured | {"spec": {**measured["spec"], "prune": prune}})
        columns = {"reducer": reducer, "schedule": "none" if number == 0 else "R=9", "fusion": fusion, "pool": "avg",
                   "image_size": 64}  # fmt: skip
        rows.append({"row": name, "label": name.replace("_", " ").title(), "columns": columns, "baseline": names[0],
                     "records": [str(path) for path in paths], "bench": str(bench) if number else None})  # fmt: skip
    path = root / f"{artefact}.json"
    manifest = {"artefact": artefact, "title": artefact, "task": task, "scale": "tiny", "seeds": list(range(seeds)),
                "results": str(root / "results"), "published": str(CONFIG / "published" / f"{artefact}.csv"),
                "rows": rows}  # fmt: skip
    path.write_text(json.dumps(manifest))
    return path


def claim(**changes) -> claims.Claim:
    base = {"id": "a", "text": "t", "left": "cropr", "right": "random", "relation": ">", "source": "s"}
    return claims.Claim.model_validate({**base, **changes})


def with_paper_schedule(artefact, schedule):
    """The same artefact, its rows knowing the schedule of the published numbers."""
    rows = [row.model_copy(update={"columns": {**row.columns, "paper_schedule": schedule}})
            for row in artefact.manifest.rows]  # fmt: skip
    return replace(artefact, manifest=artefact.manifest.model_copy(update={"rows": rows}))
