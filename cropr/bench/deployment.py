"""Export a deployed model, run the file, and say what it weighs, whether it agrees and how fast it is.

The file runs in onnxruntime on the CPU, with as many threads as torch has. Clocks are read in turn, round by round, as
in ``cropr.bench.timing``.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cropr.bench import flops
from cropr.bench.timing import Run, Tell, clock, interleave, say_nothing, summary, warm_up
from cropr.export import (
    TENSORRT_TOPK,
    Agreement,
    Exportable,
    compare,
    inspect,
    open_session,
    to_onnx,
    to_program,
)
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
    """Write ``model.pt2`` and ``model.onnx``, run the latter beside PyTorch, and time both.

    Args:
        model: deployed, float32, on the CPU.
        folder: where the files go.
        batch_size: images of the check and of the clock.
        rounds: readings of every clock.
        against_unpruned: also export the unpruned host, to a file that is deleted again, and time it in turn.
        tick: called with a word on what comes next.

    Returns:
        ``metrics`` (sizes in MB, medians in ms a batch, ``same_tokens`` of ``images``, largest difference of a logit,
        largest k of a Top-K; with ``against_unpruned`` those of ``cropr.bench.timing.summary``), ``operators`` of the
        ONNX graph by type, and ``series`` (seconds a batch, round by round).

    Raises:
        ValueError: a reducer that cannot be exported, a missing package, or a file that does not do what PyTorch does.
    """
    tell = tick or say_nothing
    exportable = Exportable(model)
    size = model.model.backbone.host.patch_embed.img_size[0]
    folder.mkdir(parents=True, exist_ok=True)
    tell("torch.export")
    program = to_program(exportable, size)
    torch.export.save(program, folder / PT2)
    tell("ONNX")
    to_onnx(program, folder / ONNX, exportable.names)
    graph = inspect(folder / ONNX)
    if graph.reducing_scatters:
        _LOG.warning("scatters with a reduction, which TensorRT refuses: %s", ", ".join(graph.reducing_scatters))
    if graph.largest_k > TENSORRT_TOPK:
        _LOG.warning("a Top-K of k = %d is above TensorRT's limit of %d", graph.largest_k, TENSORRT_TOPK)
    tell("run the file")
    session = open_session(folder / ONNX, torch.get_num_threads())
    images = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    agreement = compare(exportable, session, images)
    _require(agreement, folder / ONNX)
    metrics = {
        "onnx_mb": _megabytes(folder, ONNX),
        "pt2_mb": _megabytes(folder, PT2),
        "images": agreement.images,
        "same_tokens": agreement.same_tokens,
        "logits_difference": agreement.logits,
        "largest_k": graph.largest_k,
        "topk": len(graph.topk),
        "reducing_scatters": len(graph.reducing_scatters),
    }
    forwards: dict[str, Callable[[], Any]] = {
        "onnx": partial(_run, session, images),
        "torch": partial(_call, model, images),
    }
    if against_unpruned:
        base = _unpruned_session(model, size, tell)
        forwards["base_onnx"] = partial(_run, base, images)
    seconds = _time(forwards, rounds, tell)
    metrics |= {f"{name}_ms": float(np.median(values)) * 1e3 for name, values in seconds.items()}
    if against_unpruned:
        bound = flops.bound(flops.macs(model.model.backbone.host), flops.macs(model))
        metrics |= summary(seconds["base_onnx"], seconds["onnx"], batch_size, bound)
    return {"metrics": metrics, "operators": graph.operators, "series": seconds}


def _time(forwards: dict[str, Callable[[], Any]], rounds: int, tell: Tell) -> dict[str, list[float]]:
    """Seconds a pass by name; all in turn in every round."""
    runs = []
    for name, forward in forwards.items():
        tell(f"warm up {name}")
        runs.append(warm_up(forward, 1, "cpu", clock(Run(forward, 1))))
    readings = interleave([partial(clock, run) for run in runs], rounds, tell)
    return dict(zip(forwards, readings, strict=True))


def _run(session: Any, images: Tensor) -> None:
    session.run(["logits"], {"images": images.numpy()})


@torch.inference_mode()
def _call(model: DeployedViT, images: Tensor) -> None:
    model(images)


def _unpruned_session(model: DeployedViT, size: int, tell: Tell) -> Any:
    """The host alone in onnxruntime; its file is gone when this returns."""
    host = model.model.backbone.host
    base = Exportable(DeployedViT(prune(host, Schedule.constant(0), "none")).eval())
    tell("unpruned")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ONNX
        to_onnx(to_program(base, size), path, base.names)
        return open_session(path, torch.get_num_threads())


def _require(agreement: Agreement, path: Path) -> None:
    """Refuse a file that does something else than the model.

    Raises:
        ValueError: how many images keep other tokens, and the largest difference of a logit.
    """
    if not agreement.holds:
        raise ValueError(
            f"{path} does not agree with PyTorch: the same tokens for {agreement.same_tokens} of {agreement.images} "
            f"images, logits differ by up to {agreement.logits:.2g}; do not deploy it"
        )


def _megabytes(folder: Path, name: str) -> float:
    """A file with what stands beside it under its name (external weights), in 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.glob(f"{name}*")) / 1e6
