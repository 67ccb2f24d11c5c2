"""Small specifications of the laboratory, and records with made-up numbers in the form that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from synthetic import provenance

from cropr.bench.profiling import CATEGORIES
from cropr.bench.specs import MEASURES, LabSpec
from cropr.records import write_record

MODEL = {"name": "vit_tiny_patch16_224", "args": {"depth": 4, "embed_dim": 48, "num_heads": 3}}
RATE = {"constant": {"rate": 3}}
VARIANTS = {
    "cropr": {"reducer": "cropr", "schedule": RATE},
    "cropr_llf": {"reducer": "cropr", "schedule": RATE, "fusion": "llf"},
}


def spec(measure: str, **changes: Any) -> LabSpec:
    """A specification for images of 64 px and a ViT of depth 4."""
    values: dict[str, Any] = {"measure": measure, "model": MODEL, "image_size": 64}
    if measure == "scoring":
        values |= {"prune": VARIANTS["cropr_llf"], "precision": "fp32"}
    elif measure != "blocks":
        values["variants"] = VARIANTS
    return MEASURES[measure].model_validate({**values, **changes})


def record(measure: str, cells: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A record around cells."""
    asked = spec(measure, **changes)
    return {
        "kind": "lab",
        "id": asked.digest(),
        "spec": asked.model_dump(mode="json"),
        "metrics": {"cells": len(cells), "measured": sum("metrics" in cell for cell in cells)},
        "cells": cells,
        "provenance": provenance(31.0),
    }


SPEED = {"unpruned": 1.0, "cropr": 1.8, "cropr_llf": 1.7}
GAIN = {("fp32", "math"): 1.0, ("fp32", "flash"): 1.2, ("bf16", "math"): 2.0, ("bf16", "flash"): 2.6}


def sweep(batch_sizes: tuple[int, ...] = (4,), settings: tuple[tuple[str, str], ...] = tuple(GAIN)) -> dict[str, Any]:
    """Throughput that follows ``SPEED`` and ``GAIN``; with one image, pruning is slower. There is no cudnn kernel."""
    cells = []
    for batch in batch_sizes:
        for precision, attention in settings:
            for variant, factor in SPEED.items():
                speedup = factor if batch > 1 else factor**-0.2
                gain = speedup * GAIN[precision, attention]
                bound = {"unpruned": 1.0, "cropr": 1.9, "cropr_llf": 1.78}[variant]
                metrics = {
                    "images_per_s": 2.0 * gain, "images_per_s_iqr": 0.1, "batch_size": batch, "gmacs": 60 / factor,
                    "mfu": 0.5 * GAIN[precision, attention] / 2.6, "matmul_gflops": 100.0, "weights_mb": 12.0,
                    "working_memory_mb": 90.0 / factor, "speedup": speedup, "speedup_iqr": 0.02,
                    "speedup_low": 0.98 * speedup, "speedup_high": 1.02 * speedup, "bound": bound,
                    "share_of_bound": speedup / bound, "gain": gain, "gain_iqr": 0.1, "gain_low": 0.97 * gain,
                    "gain_high": 1.03 * gain,
                }  # fmt: skip
                place = {"variant": variant, "precision": precision, "attention": attention, "batch_size": batch}
                tokens = [17] * 5 if variant == "unpruned" else [17, 13, 10, 7, 7]
                cells.append({**place, "tokens": tokens, "metrics": metrics, "seconds": [0.1] * 3})
    for variant in SPEED:
        place = {"variant": variant, "precision": "fp32", "attention": "cudnn", "batch_size": batch_sizes[0]}
        cells.append({**place, "tokens": [17] * 5, "unsupported": "attention cudnn: no such kernel here"})
    axes = {"precisions": ["fp32", "bf16"], "attentions": ["math", "flash", "cudnn"], "batch_sizes": list(batch_sizes)}
    return record("sweep", cells, **axes)


def block_ms(count: int) -> float:
    """Latency with tiles of 16 tokens: half of a block's time is paid by the tile."""
    return 0.5 * count + 0.5 * 16 * -(-count // 16)


def blocks(counts: range = range(120, 137)) -> dict[str, Any]:
    """Latency as ``block_ms``."""
    cells = [
        {"tokens": count, "precision": "fp32", "attention": "auto", "batch_size": 2, "seconds": [block_ms(count) / 1e3],
         "metrics": {"block_s": block_ms(count) / 1e3, "block_s_iqr": 1e-5, "block_gmacs": 0.01 * count}}
        for count in counts
    ]  # fmt: skip
    return record("blocks", cells, tokens=list(counts))


def profile() -> dict[str, Any]:
    """Attention and MLP share the time; pruning takes 2 %, with LLF 5 %."""
    cells = []
    for variant, own in {"unpruned": 0.0, "cropr": 0.02, "cropr_llf": 0.05}.items():
        total = 1.0 / SPEED[variant]
        seconds = dict.fromkeys(CATEGORIES, 0.0) | {"scoring": own * total, "attention": 0.3 * total}
        seconds["mlp"] = total - sum(seconds.values())
        cells.append(
            {"variant": variant, "precision": "fp32", "attention": "auto", "batch_size": 4, "tokens": [17, 7],
             "seconds": seconds, "metrics": {"total_s": total, "pruning_share": own, "gmacs": 1.0}}
        )  # fmt: skip
    return record("profile", cells)


def training() -> dict[str, Any]:
    """Steps and memory that fall with pruning."""
    cells = []
    for variant, factor in SPEED.items():
        speedup = 1 + 0.8 * (factor - 1)
        metrics = {
            "images_per_s": 8 * speedup, "images_per_s_iqr": 0.1, "speedup": speedup, "speedup_iqr": 0.02,
            "speedup_low": 0.98 * speedup, "speedup_high": 1.02 * speedup, "bound": factor,
            "share_of_bound": speedup / factor, "state_mb": 1000.0, "training_memory_mb": 1000 + 1000 / factor,
            "inference_memory_mb": 300 + 90 / factor, "batch_size": 8, "step_ms": 1000 / speedup,
        }  # fmt: skip
        place = {"variant": variant, "precision": "fp32", "attention": "auto", "batch_size": 8, "tokens": [17, 7]}
        cells.append({**place, "seconds": [1.0] * 3, "metrics": metrics})
    return record("training", cells)


def schedules() -> dict[str, Any]:
    """Counts of 4 mod 8 cost what aligned ones cost, within 1 %; one token more costs a tenth more a multiply-add."""
    cells = []
    for variant, counts, gmacs, per_gmac in (
        ("unpruned", [], 2.0, [1.0, 1.0, 1.0]),
        ("as_in_paper", [20, 12], 1.6, [1.01, 1.0, 0.99]),
        ("multiples_of_8", [16, 8], 1.5, [1.0, 1.0, 1.0]),
        ("one_token_more", [17, 9], 1.55, [1.1, 1.11, 1.09]),
    ):
        metrics = {"images_per_s": 2.0, "speedup": 1.2, "speedup_low": 1.1, "speedup_high": 1.3, "bound": 2.0 / gmacs,
                   "share_of_bound": 0.6 * gmacs, "gain": 1.0, "batch_size": 2, "gmacs": gmacs}  # fmt: skip
        place = {"variant": variant, "precision": "fp32", "attention": "auto", "batch_size": 2}
        cells.append(
            {**place, "tokens": [25, *counts, 25], "metrics": metrics, "seconds": [gmacs * value for value in per_gmac]}
        )
    variants = {cell["variant"]: VARIANTS["cropr_llf"] for cell in cells[1:]}
    return record("sweep", cells, variants=variants)


def scoring() -> dict[str, Any]:
    """One vector saves 4 %, with an interval clear of 1."""
    cells = []
    for variant, speedup, bound in (("unpruned", 1.0, 1.0), ("one_vector", 1.76, 1.78), ("all_queries", 1.69, 1.66)):
        metrics = {"images_per_s": speedup, "images_per_s_iqr": 0.1, "speedup": speedup, "speedup_iqr": 0.02,
                   "speedup_low": speedup - 0.01, "speedup_high": speedup + 0.01, "bound": bound,
                   "share_of_bound": speedup / bound, "batch_size": 1, "gmacs": 361 / bound}  # fmt: skip
        if variant == "one_vector":
            metrics |= {"over_all_queries": 1.041, "over_all_queries_low": 1.03, "over_all_queries_high": 1.05,
                        "kept_in_both": 0.987}  # fmt: skip
        place = {"variant": variant, "precision": "bf16", "attention": "auto", "batch_size": 1}
        cells.append({**place, "tokens": [17, 17 if variant == "unpruned" else 13, 17], "metrics": metrics,
                      "seconds": [1 / speedup] * 3})  # fmt: skip
    return record("scoring", cells)


ARTEFACTS: dict[str, dict[str, dict[str, Any]]] = {
    "precision": {"vit_l_224": sweep()},
    "alignment": {"blocks": blocks(), "schedules": schedules()},
    "breakeven": {"vit_s": sweep((1, 8), (("fp32", "math"),)), "vit_b": sweep((1, 8), (("fp32", "math"),))},
    "profile": {"vit_l": profile(), "scoring": scoring()},
    "memory": {"vit_s": training()},
}
"""Records by artefact and row."""


def write_lab(root: Path, artefact: str) -> Path:
    """Write the records of an artefact and the manifest that lists them; returns the manifest."""
    rows = []
    for row, content in ARTEFACTS[artefact].items():
        path = root / "lab" / artefact / row / "record.json"
        write_record(path, content)
        rows.append({"row": row, "label": row.replace("_", " ").upper(), "bench": str(path)})
    manifest = {"artefact": artefact, "title": artefact, "scale": "tiny", "seeds": [0],
                "results": str(root / "results"), "rows": rows}  # fmt: skip
    published = Path(__file__).parents[2] / "config" / "published" / f"{artefact}.csv"
    if published.is_file():
        manifest["published"] = str(published)
    path = root / f"{artefact}.json"
    path.write_text(json.dumps(manifest))
    return path
