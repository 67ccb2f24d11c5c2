"""A deployed model as a file for other programs: ``torch.export`` and ONNX, and a check of the file by running it.

The graph has a dynamic batch and a fixed image size. Its outputs are the logits and, per block that prunes, the raster
indices of the patches alive after it: ``logits``, ``kept_1``, ``kept_2``, ... All shapes but the batch are static: a
block prunes R tokens of every image, finds them with one Top-K whose k is R, and scatters without a reduction.
TensorRT limits both; it is not run here.

B batch, K kept, R pruned.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cropr.pruning.model import DeployedViT
from cropr.pruning.reducers.select import Random

TENSORRT_TOPK = 3840
"""Largest k of TensorRT's Top-K, as its users report it (github.com/NVIDIA/TensorRT, issues 4244 and 4390)."""
TOLERANCE = 1e-4
"""Largest difference of a logit between the file and PyTorch that counts as agreement, float32."""
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Exportable(nn.Module):
    """A deployed model whose outputs are a plain tuple of tensors, as graphs have them.

    Raises:
        ValueError: a reducer that draws random numbers: no two programs draw the same.
    """

    def __init__(self, model: DeployedViT) -> None:
        super().__init__()
        if any(isinstance(reducer, Random) for reducer in model.model.reducers.values()):
            raise ValueError(
                "reducer 'random' cannot be exported: it draws from torch's generator, which no other program has; "
                "export a reducer that scores tokens, such as 'cropr'"
            )
        self.model = model

    @property
    def names(self) -> list[str]:
        """Names of the outputs: ``logits``, then ``kept_<block>`` of every block that prunes."""
        inner = self.model.model
        alive = (inner.backbone.num_patches, *inner.counts(inner.backbone.num_patches))
        return ["logits", *(f"kept_{b}" for b in map(int, inner.reducers) if alive[b] < alive[b - 1])]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B, 3, H, W] to logits [B, classes] and kept indices [B, K] int64, a block each."""
        output = self.model.detailed(images)
        return (output.logits, *output.kept.values())


@dataclass(frozen=True, slots=True)
class Graph:
    """Properties of an ONNX file that decide whether an engine takes it."""

    operators: dict[str, int]
    """How many nodes of each type, the most frequent first."""
    topk: tuple[int, ...]
    """k of every Top-K, in the graph's order."""
    reducing_scatters: tuple[str, ...]
    """Names of scatter nodes with a reduction."""

    @property
    def largest_k(self) -> int:
        """The largest k; 0 without a Top-K."""
        return max(self.topk, default=0)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The file beside PyTorch, on the same images."""

    images: int
    same_tokens: int
    """Images of which both keep the same tokens after every block."""
    logits: float
    """Largest absolute difference of a logit."""

    @property
    def holds(self) -> bool:
        """The same tokens for every image, and logits within ``TOLERANCE``."""
        return self.same_tokens == self.images and self.logits <= TOLERANCE


def to_program(model: Exportable, image_size: int) -> torch.export.ExportedProgram:
    """The model as one graph with a dynamic batch for images of ``image_size`` pixels a side; float32, on the CPU."""
    images = torch.zeros(2, 3, image_size, image_size)  # a batch of one would be taken for a constant
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model.eval(), (images,), dynamic_shapes={"images": {0: batch}})


def to_onnx(program: torch.export.ExportedProgram, path: Path, names: Sequence[str]) -> None:
    """Write an exported program as ONNX, with input ``images``; weights over 2 GB go to a file beside it.

    Args:
        program: of ``to_program``.
        path: the file to write.
        names: of the outputs.

    Raises:
        ValueError: a package is missing, with the command that installs it.
    """
    need()
    with _quiet():
        converted = torch.onnx.export(
            program, input_names=["images"], output_names=list(names), dynamo=True, optimize=True, verbose=False
        )
    assert converted is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    converted.save(path)


def inspect(path: Path) -> Graph:
    """Read the operators of an ONNX file; its weights are not loaded."""
    need()
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
    topk, scatters = [], []
    for node in graph.node:
        if node.op_type == "TopK":
            assert node.input[1] in constants, f"{node.name}: k is computed at run time; shapes are not static"
            topk.append(int(onnx.numpy_helper.to_array(constants[node.input[1]]).item()))
        elif node.op_type.startswith("Scatter"):
            reduction = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
            if reduction != "none":
                scatters.append(f"{node.name or node.op_type} ({reduction})")
    operators = Counter(node.op_type for node in graph.node)
    return Graph(dict(operators.most_common()), tuple(topk), tuple(scatters))


def open_session(path: Path, threads: int) -> Any:
    """An onnxruntime session on the CPU, with so many threads for one operation."""
    need()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def compare(model: Exportable, session: Any, images: Tensor) -> Agreement:
    """Run the same images [B, 3, H, W] through PyTorch and an onnxruntime session; compare tokens block by block."""
    expected = [output.numpy() for output in model(images)]
    actual = session.run(model.names, {"images": images.numpy()})
    same = np.ones(len(images), dtype=bool)
    for ours, theirs in zip(expected[1:], actual[1:], strict=True):
        same &= (ours == theirs).all(axis=1)
    return Agreement(len(images), int(same.sum()), float(np.abs(expected[0] - actual[0]).max()))


def need() -> None:
    """Check that the packages for ONNX are installed.

    Raises:
        ValueError: names of the missing packages, and the command that installs them.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(_PACKAGES)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's warnings about its own parts."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnxscript", "onnx_ir"))}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
