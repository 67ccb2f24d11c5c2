"""Tiny hosts and reducers with weights that matter, random tokens for them, and checks that many tests make."""

from dataclasses import fields, replace

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import Tensor, nn

from cropr.pruning.methods import REDUCERS
from cropr.pruning.reducers import Context, create
from cropr.pruning.tokens import Tokens

DIM, PATCHES, HEADS, KEEP = 8, 20, 2, 13
RULES = [
    *(("evit", {"rule": rule}) for rule in ("reference", "corrected")),
    *((name, {"depth": depth}) for name in ("tome", "pitome", "tofu") for depth in (0.25, 0.75)),
    *(("k_medoids", {"rule": rule}) for rule in ("reference", "corrected")),
    *(("k_medoids", {"weights": weights}) for weights in ("cls", "equal")),
    *(("dpc_knn", {"rule": rule, "weights": w}) for rule in ("reference", "corrected") for w in ("learned", "equal")),
    ("sit", {}),
    ("sinkhorn", {}),
    ("sinkhorn", {"epsilon": 0.25, "iterations": 5}),
    *(("patch_merger", {"rule": rule}) for rule in ("reference", "corrected")),
    *(("ats", {"rule": rule}) for rule in ("reference", "corrected")),
    ("dynamic_vit", {}),
]
"""Every reducer but the pruners, with the options that change its rule."""
PRUNERS = [name for name, method in REDUCERS.items() if name != "none" and method.family == "pruner"]
each_rule = pytest.mark.parametrize(("name", "options"), RULES, ids=str)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
VIT, EVA = "vit_tiny_patch16_224", "eva02_tiny_patch14_224"
HOSTS = {
    "vit": (VIT, {}),
    "vit-avg-with-cls": (VIT, {"global_pool": "avg", "pool_include_prefix": True}),
    "gap-without-cls": ("vit_base_patch16_gap_224", {}),
    "registers": (VIT, {"reg_tokens": 4, "no_embed_class": True}),
    "registers-avg": (VIT, {"reg_tokens": 3, "global_pool": "avg", "pool_include_prefix": True}),
    "layerscale": (VIT, {"init_values": 1e-2, "global_pool": "avg"}),
    "norms": (VIT, {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "pre-norm": (VIT, {"pre_norm": True}),
    "post-norm": (VIT, {"block_fn": ResPostBlock}),
    "parallel": (VIT, {"block_fn": ParallelScalingBlock}),
    "attention-pool": (VIT, {"global_pool": "map"}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "dynamic-size": (VIT, {"dynamic_img_size": True}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"patch_size": 2}),  # of its convolutions' cells, 4 px each
    "eva": (EVA, {}),
    "eva-fused-qkv": (EVA, {"qkv_fused": True, "init_values": 1e-2, "global_pool": "token"}),
    "eva-norms": ("eva02_base_patch14_224", {"qk_norm": True}),
    "eva-mixed-rope": ("vit_small_patch16_rope_mixed_224", {}),
}
"""Models of timm, and how each differs from ``SMALL``."""


def randomised(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Every parameter at a value that matters: norms, biases and fusions start without effect."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=std)
    return module.eval()


def host_of(name: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    model, arguments = HOSTS[name]
    if name == "eva-norms":
        pytest.importorskip("timm", "1.0.30", reason="older ones have no such model")
    return randomised(timm.create_model(model, **{**SMALL, **arguments, **changes}))


def pictures(batch: int = 2, height: int = 32, width: int | None = None) -> Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(1))


def assert_deployed(model: nn.Module, images: Tensor) -> nn.Module:
    """The deployed form has the same logits and tokens as the training form in eval mode; returns it."""
    fast = model.deploy()
    trained, deployed = model(images), fast.detailed(images)
    torch.testing.assert_close(fast(images), trained.logits, rtol=1e-6, atol=1e-6)
    assert trained.kept.keys() == deployed.kept.keys()
    assert all(torch.equal(trained.kept[block], deployed.kept[block]) for block in trained.kept)
    return fast


def assert_batchwise(model: nn.Module, images: Tensor) -> None:
    together = model(images)
    for b in range(len(images)):
        alone = model(images[b : b + 1])
        torch.testing.assert_close(alone.logits, together.logits[b : b + 1], rtol=1e-4, atol=1e-4)
        assert all(torch.equal(alone.kept[block], index[b : b + 1]) for block, index in together.kept.items())


def assert_one_graph(fast: nn.Module) -> None:
    """``torch.compile`` takes it whole, and computes the same."""
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    results = []
    for model in (compiled, fast):
        torch.manual_seed(0)
        results.append(model(pictures()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def assert_exports(fast: nn.Module) -> None:
    """As one program for every batch size."""
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(fast, (pictures(3),), dynamic_shapes=shapes).module()
    torch.testing.assert_close(program(pictures(5)), fast(pictures(5)), rtol=1e-4, atol=1e-4)


def case(batch: int = 3, prefix: int = 1, patches: int = PATCHES, dim: int = DIM) -> tuple[Tokens, Context]:
    """Random tokens, and all that a reducer may read, as one block would give it."""
    tokens = Tokens.full(torch.randn(batch, prefix + patches, dim), prefix)
    rows = torch.randn(batch, HEADS, 1 + patches, 1 + patches).softmax(dim=3)
    return tokens, Context(
        cls_attention=rows[:, :, 0, 1:],
        mean_key=torch.randn(batch, prefix + patches, 4),
        value_norms=torch.rand(batch, HEADS, patches) + 0.5,
        column_sums=rows.sum(dim=(1, 2))[:, 1:],
        pixels=torch.rand(batch, patches),
    )


def part(tokens: Tokens, context: Context, b: int) -> tuple[Tokens, Context]:
    """One image of a batch, and what was read for it."""

    def cut(one):
        found = {field.name: getattr(one, field.name) for field in fields(one)}
        return replace(one, **{key: v[b : b + 1] for key, v in found.items() if isinstance(v, torch.Tensor)})

    return cut(tokens), cut(context)


def read(reducer, context: Context) -> Context:
    """What the reducer says that it reads, and no more."""
    return Context(**{name: getattr(context, name) for name in reducer.reads})


def make(name: str, keep: int = KEEP, dim: int = DIM, **options):
    """A reducer in evaluation."""
    torch.manual_seed(1)
    return randomised(create(name, dim, 4, keep=keep, **options))


def run(name: str, tokens: Tokens, context: Context, keep: int = KEEP, **options) -> Tokens:
    reducer = make(name, keep, tokens.x.shape[-1], **options)
    return reducer(tokens, keep, read(reducer, context), want_pruned=False).kept
