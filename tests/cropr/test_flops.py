"""Deployment: one graph, programs and ONNX files that do what the model does; multiply-adds and published counts."""

from importlib.util import find_spec

import pytest
import timm
import torch
from cases import PRUNERS, host_of
from cases import pictures as images
from torch import nn

import cropr
from cropr.__main__ import main
from cropr.bench.heads import Heads
from cropr.bench.models import build_on_meta
from cropr.export import TOLERANCE, Exportable, compare, inspect, open_session, to_onnx, to_program
from cropr.pruning import flops
from cropr.pruning.backbones.windows import windowed
from cropr.pruning.methods import REDUCERS
from cropr.pruning.model import DeployedViT, PrunedViT
from cropr.pruning.schedule import Schedule, attended
from cropr.records import read_record
from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks.base import build_model
from cropr.tasks.detection import DetModelSpec

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
def test_inductor_compiles_a_model_that_does_the_same():
    """Without a C++ compiler, up to the code that Inductor would compile. Other models: ``test_model.py``."""
    torch.compiler.reset()
    model = deployed("eva", fusion="llf", depth=3)
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


LARGE = ModelSpec(name="vit_large_patch16_224", args={"global_pool": "avg"})
SQUARES = {"squares": {"at": {5: 80, 8: 64, 11: 48, 14: 32, 20: 16}}}
"""The detector's schedule: sides of the grids that the kept tokens would fill, after blocks 5, 8, ..."""


def by_formula(model, dim=48, mlp=4):
    """A ViT with 16 px patches and CLS: 4 N C^2 + 2 N^2 C in attention, 2 r N C^2 in the MLP, one product a score."""
    inner, host = model.model, model.model.backbone.host
    patches = inner.backbone.num_patches
    entering = attended(inner.counts(patches), patches, inner.fuses_early, prefix=1)
    blocks = sum((4 + 2 * mlp) * n * dim * dim + 2 * n * n * dim for n in entering)
    left = [count + 1 for count in inner.counts(patches)]
    scored = sum(n * dim for n, after in zip(entering, left, strict=True) if after < n)
    return blocks + scored + patches * 3 * 16 * 16 * dim + dim * host.num_classes


@pytest.mark.parametrize(("schedule", "fusion"), [
    (Schedule.constant(0), "none"), (Schedule.constant(2, align=8), "none"), (Schedule.stages({1: 9}), "llf"),
])  # fmt: skip
def test_count_equals_the_formula(schedule, fusion):
    host = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=96, **SMALL)
    options = {"num_queries": 9, "num_heads": 3, "qkv_proj": True}  # training only: deployment folds them
    model = cropr.prune(host, schedule, reducer="cropr", fusion=fusion, reducer_options=options).deploy()
    assert flops.macs(model).total == by_formula(model)
    before = host.blocks[0].mlp.fc1.weight
    assert before.device.type == "cpu"
    assert before.isfinite().all()


SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 3}
HOSTS = ("vit", "gap-without-cls", "registers", "layerscale", "distilled", "norms", "parallel", "eva", "eva-norms")


@pytest.mark.parametrize("host", HOSTS)
def test_cost_of_token_counts_equals_the_count_of_the_whole_model(host):
    model = host_of(host, **SMALL)
    cost, patches = flops.Cost(model), 16
    for fusion in ("none", "llf"):
        pruned = cropr.prune(model, Schedule.constant(3), fusion=fusion).deploy()
        assert cost.total(pruned.model.counts(patches), fusion == "llf") == flops.macs(pruned).total
    assert cost.total((patches,) * 3, False) == cost.total((patches,) * 3, True) == flops.macs(model).total


METHODS = [name for name in REDUCERS if name != "none"]


@pytest.mark.parametrize(("host", "name", "options"), [
    *(("vit", name, {}) for name in METHODS), ("vit", "k_medoids", {"rule": "corrected"}),
    ("registers", "ats", {}), ("norms", "tome", {}), ("eva", "k_medoids", {}),
], ids=str)  # fmt: skip
def test_cost_of_a_method_equals_the_count_of_the_whole_model(host, name, options):
    """The weighted pooling is left out. Wherever the method can act; on other hosts, what is read costs otherwise."""
    kind, model = REDUCERS[name].load(), host_of(host, img_size=64, patch_size=16, **SMALL)
    for place in kind.places:
        where = {"place": place} if len(kind.places) > 1 else {}
        pruned = cropr.prune(model, Schedule.stages({1: 5, 2: 7}), name, reducer_options=options | where).deploy()
        cost = flops.Cost(model).total(pruned.model.counts(16), False, pruned.model.reducers["1"])
        assert cost == pytest.approx(flops.macs(pruned).total, rel=0.001)


def test_windows_make_attention_cheaper():
    host = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=128, class_token=False, global_pool="avg")
    cost = flops.Cost(windowed(host, window=2, global_blocks=[2]))
    assert cost.block(2, 64) - cost.block(1, 64) == 2 * 64 * (64 - 4) * 192


@pytest.mark.model
def test_published_counts_of_vit_large():
    base = flops.macs(build_on_meta(LARGE, PruneSpec(), 224).backbone.host)
    assert base.total / 1e9 == pytest.approx(61.6, abs=0.05)
    for schedule, fusion, published in (
        ({"constant": {"rate": 8}}, "llf", 1.78),
        ({"constant": {"rate": 8}}, "none", 1.91),
        ({"stages": {"at": {6: 50, 12: 50, 18: 50}}}, "none", 1.63),
    ):
        model = build_on_meta(LARGE, PruneSpec(reducer="cropr", schedule=schedule, fusion=fusion), 224).deploy()
        assert base.total / flops.macs(model).total == pytest.approx(published, rel=0.005)


@pytest.mark.model
def test_published_counts_of_the_detector():
    """EVA-02-L at 1536 px: 2790 and 1273 G are linear layers alone. Then all products, and with heads."""
    eva, spec = ModelSpec(name="eva02_large_patch14_224", args={"patch_size": 16}), DetModelSpec()
    pruned = PruneSpec(reducer="cropr", schedule=SQUARES, fusion="llf")
    dense, sparse = (flops.macs(build_on_meta(eva, p, 1536, spec).deploy()) for p in (PruneSpec(), pruned))
    assert [round(found.linear / 1e9, 1) for found in (dense, sparse)] == [2789.9, 1273.0]
    assert [round(found.total / 1e9, 1) for found in (dense, sparse)] == [4258.8, 1789.6]
    heads = Heads(spec, 1024, 16, (96, 96)).macs()
    assert [round((found.total + heads) / 1e9) for found in (dense, sparse)] == [5121, 2652]


def test_heads_by_hand():
    """Written out from the sizes of the layers."""
    grid, d, c = 96 * 96, 1024, 256
    places = [16 * grid, 4 * grid, grid, grid // 4, grid // 16]
    neck = grid * 4 * (d * d // 2 + 4 * d // 2 * d // 4) + grid * 4 * d * d // 2
    neck += sum(n * (width * c + 9 * c * c) for n, width in zip(places, (c, d // 2, d, d), strict=False))
    proposals = sum(places) * (2 * 9 * c * c + c * 15)
    boxes = 1000 * 3 * (49 * 4 * 9 * c * c + 49 * c * 1024 + 1024 * (81 + 4))
    masks = 100 * (196 * 4 * 9 * c * c + 196 * 4 * c * c + 784 * c * 80)
    assert Heads(DetModelSpec(), d, 16, (96, 96)).macs() == neck + proposals + boxes + masks


def test_a_matrix_times_a_vector_is_counted():
    class Product(torch.nn.Module):
        def forward(self, x, y):
            return x @ y

    found = flops.counts(Product(), torch.empty(2, 5, 3), torch.empty(3))
    assert found["Global"] == {"aten.mv": 2 * 5 * 3}


MAE_L = ModelSpec(name="vit_large_patch16_224", args={"global_pool": "avg", "pool_include_prefix": True})
R8 = {"constant": {"rate": 8}}


def _build(prune: PruneSpec) -> PrunedViT:
    with torch.device("meta"):
        return build_model(MAE_L, prune, num_classes=1000, image_size=224)


def test_parameters_modules_and_tokens_of_the_classification_models():
    def parameters(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    plain, model = _build(PruneSpec()), _build(PruneSpec(reducer="cropr", schedule=R8, fusion="llf"))
    assert (parameters(plain), parameters(model)) == (304_326_632, 511_651_288)
    assert list(model.reducers) == [str(block) for block in range(1, 23)]
    assert {parameters(module) for module in model.reducers.values()} == {9_423_848}
    assert list(_build(PruneSpec(reducer="cropr", schedule=R8)).reducers)[-1] == "23"
    assert model.token_trace[:3] == (197, 188, 180)
    stages = PruneSpec(reducer="cropr", schedule={"stages": {"at": {6: 50, 12: 50, 18: 50}}})
    assert sorted(set(_build(stages).token_trace)) == [47, 97, 147, 197]
    # Memory of the deployed model, beside the host's.
    host = sum(tensor.numel() for tensor in model.backbone.host.state_dict().values())
    folded = sum(module.deploy().scorer.weight.numel() for module in model.reducers.values())
    assert folded / host == pytest.approx(7.4e-5, rel=0.01)


def test_the_last_block_of_a_pruned_model_has_no_drop_path():
    spec = ModelSpec(name="vit_tiny_patch16_224", drop_path=0.2)
    with torch.device("meta"):
        pruned = build_model(spec, PruneSpec(reducer="cropr", schedule=R8), 10, 224)
        plain = build_model(spec, PruneSpec(), 10, 224)
    assert isinstance(pruned.backbone.host.blocks[-1].drop_path1, torch.nn.Identity)
    assert isinstance(pruned.backbone.host.blocks[-1].drop_path2, torch.nn.Identity)
    assert pruned.backbone.host.blocks[-2].drop_path1.drop_prob > 0
    assert plain.backbone.host.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
