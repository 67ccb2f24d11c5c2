"""Export a deployed model, run the file in onnxruntime on the CPU beside PyTorch, and time both in turn."""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cropr.bench.timing import Tell, against, no_progress, speed, time_passes
from cropr.export import TENSORRT_TOPK, Exportable, Graph, compare, inspect, open_session, to_onnx, to_program
from cropr.pruning import flops
from cropr.pruning.model import DeployedViT, prune
from cropr.pruning.schedule import Schedule

ONNX, PT2 = "model.onnx", "model.pt2"
"""Names of the files."""

_LOG = logging.getLogger(__name__)


def export(
    model: DeployedViT,
    folder: Path,
    batch_size: int = 4,
    rounds: int = 5,
    against_unpruned: bool = False,
    tick: Tell | None = None,
) -> dict[str, Any]:
    """Write ``model.pt2`` and ``model.onnx``, check the latter against PyTorch, and time both.

    Args:
        model: deployed, float32, on the CPU.
        folder: of the files.
        batch_size, rounds: images of the check and of the timing; readings of every clock.
        against_unpruned: also export the unpruned host, to a file that is deleted again, and time it in turn.
        tick: called with a word on what comes next.

    Returns:
        ``metrics`` (sizes in MB, medians in ms a batch, ``same_tokens`` of ``images``, largest difference of a logit,
        largest k of a Top-K; with ``against_unpruned`` throughput and speed-up), ``operators`` of the ONNX graph by
        type, and ``series`` (seconds a batch, round by round).

    Raises:
        ValueError: a reducer that cannot be exported, a missing package, or a file that does not agree with PyTorch.
    """
    tell = tick or no_progress
    exportable, host = Exportable(model), model.model.backbone.host
    size = host.patch_embed.img_size[0]
    images = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    graph = _write(exportable, size, folder, tell)
    tell("run the file")
    session = open_session(folder / ONNX, torch.get_num_threads())
    agreement = compare(exportable, session, images)
    if not agreement.holds:
        raise ValueError(
            f"{folder / ONNX} does not agree with PyTorch: the same tokens for {agreement.same_tokens} of "
            f"{agreement.images} images, logits differ by up to {agreement.logits:.2g}; do not deploy it"
        )
    inputs = {"images": images.numpy()}
    passes = {"onnx": partial(session.run, ["logits"], inputs), "torch": partial(model, images)}
    if against_unpruned:
        passes["base_onnx"] = partial(_unpruned_session(model, size, tell).run, ["logits"], inputs)
    with torch.inference_mode():
        seconds = time_passes(passes, rounds, "cpu", tell)
    metrics = {
        "onnx_mb": _megabytes(folder, ONNX),
        "pt2_mb": _megabytes(folder, PT2),
        "images": agreement.images,
        "same_tokens": agreement.same_tokens,
        "logits_difference": agreement.logits,
        "largest_k": graph.largest_k,
        "topk": len(graph.topk),
        "reducing_scatters": len(graph.reducing_scatters),
        **{f"{name}_ms": float(np.median(values)) * 1e3 for name, values in seconds.items()},
    }
    if against_unpruned:
        base, mac_ratio = seconds["base_onnx"], flops.macs(host).total / flops.macs(model).total
        metrics |= {f"base_{name}": value for name, value in speed(base, batch_size).items()}
        metrics |= speed(seconds["onnx"], batch_size) | against(base, seconds["onnx"], mac_ratio)
    return {"metrics": metrics, "operators": graph.operators, "series": seconds}


def _write(model: Exportable, size: int, folder: Path, tell: Tell) -> Graph:
    """Write both files, and warn of operators that TensorRT refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    tell("torch.export")
    program = to_program(model, size)
    torch.export.save(program, folder / PT2)
    tell("ONNX")
    to_onnx(program, folder / ONNX, model.names)
    graph = inspect(folder / ONNX)
    if graph.reducing_scatters:
        _LOG.warning("scatters with a reduction, which TensorRT refuses: %s", ", ".join(graph.reducing_scatters))
    if graph.largest_k > TENSORRT_TOPK:
        _LOG.warning("a Top-K of k = %d is above TensorRT's limit of %d", graph.largest_k, TENSORRT_TOPK)
    return graph


def _unpruned_session(model: DeployedViT, size: int, tell: Tell) -> Any:
    """The host alone in onnxruntime; its file is deleted when this returns."""
    base = Exportable(DeployedViT(prune(model.model.backbone.host, Schedule.constant(0), "none")).eval())
    tell("unpruned")
    with tempfile.TemporaryDirectory() as folder:
        to_onnx(to_program(base, size), Path(folder) / ONNX, base.names)
        return open_session(Path(folder) / ONNX, torch.get_num_threads())


def _megabytes(folder: Path, name: str) -> float:
    """A file with what stands beside it under its name (external weights), in 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.glob(f"{name}*")) / 1e6
