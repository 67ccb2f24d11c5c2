"""A deployed model as a file for other programs: ``torch.export`` and ONNX; the file is checked and timed.

The graph has a dynamic batch and a fixed image size. Its outputs are the logits and, per block that prunes, the raster
indices of the patches alive after it: ``logits``, ``kept_1``, ``kept_2``, ... All shapes but the batch are static. A
pruner finds the R tokens of every image that go with one Top-K whose k is R, and scatters without a reduction, unlike
some methods that merge (docs/reducers.md). TensorRT limits both; it is not run here.
"""

import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cropr.bench.timing import Tell, against, no_progress, speed, time_passes
from cropr.pruning import flops
from cropr.pruning.model import DeployedViT, prune
from cropr.pruning.reducers.select import Random
from cropr.pruning.schedule import Schedule
from cropr.records import replacing

TENSORRT_TOPK = 3840
"""Largest k of TensorRT's Top-K, as its users report it (github.com/NVIDIA/TensorRT, issues 4244 and 4390)."""
TOLERANCE = 1e-4
"""Largest difference of a logit between the file and PyTorch that counts as agreement, float32."""
ONNX, PT2 = "model.onnx", "model.pt2"
"""Names of the files."""
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LOG = logging.getLogger(__name__)


def export(
    model: DeployedViT,
    folder: Path,
    batch_size: int = 4,
    rounds: int = 5,
    against_unpruned: bool = False,
    tell: Tell = no_progress,
) -> dict[str, Any]:
    """Write ``model.pt2`` and ``model.onnx``, check the latter against PyTorch, and time both.

    ``model`` is deployed, float32, on the CPU; ``batch_size`` images are checked and timed. With ``against_unpruned``
    the unpruned host is exported, too, and timed in turn. Returns ``metrics`` (sizes in MB, medians in ms a batch,
    ``same_tokens`` of ``images``, largest difference of a logit, largest k of a Top-K; throughput and speed-up),
    ``operators`` by type, and ``series`` (seconds a batch, round by round). Raises ValueError: a reducer that cannot be
    exported, a missing package, or a file that does not agree with PyTorch.
    """
    exportable, host = Exportable(model), model.model.backbone.host
    size, generator = host.patch_embed.img_size[0], torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, size, size, generator=generator)
    tell("torch.export")
    program = to_program(exportable, size)
    torch.export.save(program, buffer := io.BytesIO())
    with replacing(folder / PT2) as temporary:  # on a full disk, torch's own writer would abort the process
        temporary.write_bytes(buffer.getbuffer())
    tell("ONNX")
    to_onnx(program, folder / ONNX, exportable.names)
    operators, of_graph = inspect(folder / ONNX)
    tell("run the file")
    session = open_session(folder / ONNX, torch.get_num_threads())
    same, difference = compare(exportable, session, images)
    if same < batch_size or difference > TOLERANCE:
        found = f"the same tokens for {same} of {batch_size} images, logits differ by up to {difference:.2g}"
        raise ValueError(f"{folder / ONNX} does not agree with PyTorch: {found}; do not deploy it")
    inputs = {"images": images.numpy()}
    passes = {"onnx": partial(session.run, ["logits"], inputs), "torch": partial(model, images)}
    if against_unpruned:
        passes["base_onnx"] = partial(_unpruned_session(model, size, tell).run, ["logits"], inputs)
    with torch.inference_mode():
        seconds = time_passes(passes, rounds, "cpu", tell)
    # A file of weights may lie beside.
    sizes = {file: sum(part.stat().st_size for part in folder.glob(f"{file}*")) for file in (ONNX, PT2)}
    metrics = {
        **{f"{file.partition('.')[2]}_mb": size / 1e6 for file, size in sizes.items()},
        **{"images": batch_size, "same_tokens": same, "logits_difference": difference},
        **of_graph,
        **{f"{name}_ms": float(np.median(values)) * 1e3 for name, values in seconds.items()},
    }
    if against_unpruned:
        base, mac_ratio = seconds["base_onnx"], flops.macs(host).total / flops.macs(model).total
        metrics |= {f"base_{name}": value for name, value in speed(base, batch_size).items()}
        metrics |= speed(seconds["onnx"], batch_size) | against(base, seconds["onnx"], mac_ratio)
    return {"metrics": metrics, "operators": operators, "series": seconds}


def _unpruned_session(model: DeployedViT, size: int, tell: Tell) -> Any:
    """The host alone in onnxruntime; its file is deleted when this returns."""
    base = Exportable(DeployedViT(prune(model.model.backbone.host, Schedule.constant(0), "none")).eval())
    tell("unpruned")
    with tempfile.TemporaryDirectory() as folder:
        to_onnx(to_program(base, size), Path(folder) / ONNX, base.names)
        return open_session(Path(folder) / ONNX, torch.get_num_threads())


class Exportable(nn.Module):
    """A deployed model whose outputs are a plain tuple of tensors, as graphs have them. Raises ValueError: a reducer
    that draws random numbers: no two programs draw the same."""

    def __init__(self, model: DeployedViT) -> None:
        super().__init__()
        if any(isinstance(reducer, Random) for reducer in model.model.reducers.values()):
            why = "it draws from torch's generator, which no other program has"
            raise ValueError(f"reducer 'random' cannot be exported: {why}; export one that scores tokens, as 'cropr'")
        self.model = model

    @property
    def names(self) -> list[str]:
        """Names of the outputs: ``logits``, then ``kept_<block>`` of every block that leaves fewer; no slots."""
        inner = self.model.model
        if any(reducer.slots for reducer in inner.reducers.values()):
            return ["logits"]
        alive = (inner.backbone.num_patches, *inner.counts(inner.backbone.num_patches))
        return ["logits", *(f"kept_{b}" for b in map(int, inner.reducers) if alive[b] < alive[b - 1])]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B, 3, H, W] to logits [B, classes] and the indices kept, int64, a block each."""
        output = self.model.detailed(images)
        return (output.logits, *output.kept.values())


def to_program(model: Exportable, image_size: int) -> torch.export.ExportedProgram:
    """The model as one graph with a dynamic batch for images of ``image_size`` pixels a side; float32, on the CPU."""
    images = torch.zeros(2, 3, image_size, image_size)  # a batch of one would be taken for a constant
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model.eval(), (images,), dynamic_shapes={"images": {0: batch}})


def to_onnx(program: torch.export.ExportedProgram, path: Path, names: Sequence[str]) -> None:
    """Write a program of ``to_program`` as ONNX, with input ``images`` and the named outputs; weights over 2 GB go to a
    file beside it. Raises what ``need`` raises."""
    need()
    before, how = logging.root.manager.disable, dict[str, Any](dynamo=True, optimize=True, verbose=False)
    logging.disable(logging.WARNING)  # the exporter warns of its own parts
    try:
        with warnings.catch_warnings(action="ignore"):
            converted = torch.onnx.export(program, input_names=["images"], output_names=list(names), **how)
    finally:
        logging.disable(before)
    assert converted is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # no half file under the final name
        converted.save(Path(folder) / path.name)
        for part in Path(folder).iterdir():
            part.replace(path.with_name(part.name))


def inspect(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Read an ONNX file, without its weights, and warn of what TensorRT refuses: numbers of nodes by type; numbers of
    Top-K (``topk``) and scatters with a reduction (``reducing_scatters``), and the ``largest_k`` of a Top-K."""
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
    if scatters:
        _LOG.warning("scatters with a reduction, which TensorRT refuses: %s", ", ".join(scatters))
    if max(topk, default=0) > TENSORRT_TOPK:
        _LOG.warning("a Top-K of k = %d is above TensorRT's limit of %d", max(topk), TENSORRT_TOPK)
    operators = Counter(node.op_type for node in graph.node)
    found = {"largest_k": max(topk, default=0), "topk": len(topk), "reducing_scatters": len(scatters)}
    return dict(operators.most_common()), found


def open_session(path: Path, threads: int) -> Any:
    """An onnxruntime session on the CPU, with so many threads for one operation."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def compare(model: Exportable, session: Any, images: Tensor) -> tuple[int, float]:
    """Number of images [B, 3, H, W] for which PyTorch and an onnxruntime session keep the same tokens in every block,
    and the largest absolute difference of a logit."""
    expected = [output.numpy() for output in model(images)]
    actual = session.run(model.names, {"images": images.numpy()})
    same = np.ones(len(images), dtype=bool)
    for ours, theirs in zip(expected[1:], actual[1:], strict=True):
        same &= (ours == theirs).all(axis=1)
    return int(same.sum()), float(np.abs(expected[0] - actual[0]).max())


def need() -> None:
    """ValueError, with the command that installs them, if packages for ONNX are missing."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(_PACKAGES)}")
