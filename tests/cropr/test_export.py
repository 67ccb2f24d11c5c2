"""Deployment: one graph under torch.compile, torch.export and ONNX files that do what the model does."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from cases import PRUNERS, host_of
from cases import pictures as images
from torch import nn

import cropr
from cropr.__main__ import main
from cropr.export import TOLERANCE, Exportable, compare, inspect, open_session, to_onnx, to_program
from cropr.pruning.methods import REDUCERS
from cropr.pruning.model import DeployedViT
from cropr.pruning.schedule import Schedule
from cropr.records import read_record

with_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")), reason="needs the ONNX packages"
)


def deployed(host: str, reducer: str = "cropr", fusion: str = "llf", depth: int = 4, **schedule: int) -> DeployedViT:
    host = host_of(host, depth=depth)
    return cropr.prune(host, Schedule.constant(3, **schedule), reducer, fusion).deploy()


@pytest.mark.parametrize(
    ("settings", "blocks", "counts"),
    [
        ({}, (1, 2), [12, 9]),
        ({"fusion": "none"}, (1, 2, 3), [12, 9, 6]),
        ({"fusion": "none", "align": 8}, (1, 3), [15, 7]),  # with the prefix, 17, 13, 10, 7 become 17, 16, 16, 8
    ],
)
def test_outputs_are_named_after_the_blocks_that_prune(settings, blocks, counts):
    exportable = Exportable(deployed("vit", **settings))
    assert exportable.names == ["logits", *(f"kept_{block}" for block in blocks)]
    logits, *kept = exportable(images(2))
    assert logits.shape == (2, 5)
    assert [index.shape for index in kept] == [(2, count) for count in counts]
    with pytest.raises(ValueError, match="reducer 'random' cannot be exported"):
        Exportable(deployed("vit", reducer="random"))


@pytest.mark.model
@pytest.mark.parametrize(("host", "fusion"), [("vit", "none"), ("eva", "llf")])
def test_every_host_compiles_to_one_graph(host, fusion):
    """Without a C++ compiler, up to the code that Inductor would compile. Other methods: ``test_model.py``."""
    torch.compiler.reset()
    model = deployed(host, fusion=fusion, depth=3)
    backend = "inductor" if torch._inductor.config.cpp.cxx[-1] else "aot_eager"
    found = torch.compile(model, fullgraph=True, backend=backend)(images(2))
    torch.testing.assert_close(found, model(images(2)), rtol=1e-5, atol=1e-5)


@pytest.mark.model
@with_onnx
@pytest.mark.parametrize(
    ("host", "reducer", "fusion"),
    [
        *(("eva", "attn_topk", "llf"), ("vit", "variance", "none"), ("eva", "cropr", "llf")),
        *(("vit", name, "none") for name in REDUCERS if name not in ("none", *PRUNERS)),
    ],
)
def test_onnx_file_does_what_the_model_does(tmp_path, host, reducer, fusion):
    exportable = Exportable(deployed(host, reducer, fusion, depth=3))
    program, path = to_program(exportable, 32), tmp_path / "model.onnx"
    for ours, theirs in zip(exportable(images(3)), program.module()(images(3)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    to_onnx(program, path, exportable.names)
    operators, found = inspect(path)
    assert "NonZero" not in operators  # its result would have a shape of its own
    sites = 1 if fusion == "llf" else 2
    if reducer in PRUNERS:
        assert found == {"largest_k": 4, "topk": sites, "reducing_scatters": 0}  # k tokens go, the first time one more
    assert len(exportable.names) == (1 if REDUCERS[reducer].family == "slots" else 1 + sites)  # slots have no place
    session = open_session(path, threads=1)
    for batch in (1, 2, 5):
        same, difference = compare(exportable, session, images(batch))
        assert same == batch
        assert difference <= TOLERANCE


@pytest.mark.model
@with_onnx
def test_reducing_scatters_are_found(tmp_path, caplog):
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            index = x.topk(2, dim=1).indices
            return x.scatter_reduce(1, index, x[:, :2], "sum")

    path = tmp_path / "adds.onnx"
    to_onnx(torch.export.export(Adds(), (torch.randn(2, 4),)), path, ["sum"])
    with caplog.at_level("WARNING"):
        _, found = inspect(path)
    assert found == {"largest_k": 2, "topk": 1, "reducing_scatters": 1}
    assert "(add)" in caplog.text


@pytest.mark.model
@with_onnx
def test_a_file_of_another_model_does_not_agree(tmp_path):
    exportable, path = Exportable(deployed("vit", depth=3)), tmp_path / "model.onnx"
    to_onnx(to_program(exportable, 32), path, exportable.names)
    with torch.no_grad():
        exportable.model.model.reducers["1"].scorer.weight.neg_()  # prunes what the file keeps
    same, _ = compare(exportable, open_session(path, threads=1), images(4))
    assert same < 4


@pytest.mark.model
@with_onnx
def test_command_exports_and_leaves_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr("cropr.bench.timing.MIN_SAMPLE_S", 0)
    out = tmp_path / "out"
    command = ["export", "--model", "test_vit", "--image-size", "64", "--rate", "2", "--out", str(out)]
    assert main([*command, "--bench", "--rounds", "3", "--batch-size", "2"]) == 0
    record = read_record(out)
    metrics = record["metrics"]
    assert (out / "model.pt2").is_file()
    assert (metrics["same_tokens"], metrics["images"], metrics["reducing_scatters"]) == (2, 2, 0)
    assert metrics["largest_k"] == 3
    assert metrics["onnx_mb"] > 0
    assert metrics["speedup_low"] <= metrics["speedup"] <= metrics["speedup_high"]
    assert record["provenance"]["packages"]["onnxruntime"]
    assert record["tokens"][0] == 17
