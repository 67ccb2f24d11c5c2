"""The FLOP count: against hand-written numbers, published counts and torch's own counter."""

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cropr
from cropr.bench import flops
from cropr.pruning.schedule import Schedule, attended

LARGE = flops.BlockDims.standard(dim=1024)
"""A block of ViT-L."""


def counted(model, size):
    """MACs of one image by torch's counter, which knows no fused attention on CPU: the math kernel is made to run."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 2


# Plain numbers -------------------------------------------------------------------------------------------------------


def test_block_by_hand():
    dims = flops.BlockDims.standard(dim=2, mlp_ratio=4)
    # 3 tokens: projections 4*3*4, attention 2*9*2, MLP 2*3*2*8
    assert flops.block_macs(3, dims) == 48 + 36 + 96


@pytest.mark.parametrize(
    ("schedule", "fusion", "gmac"),
    [
        (Schedule.constant(0), False, 61.40),
        (Schedule.constant(8), True, 34.51),
        (Schedule.constant(8), False, 32.10),
        (Schedule.stages({6: 50, 12: 50, 18: 50}), False, 37.73),
        (Schedule.stages({6: 50, 12: 50, 18: 50}), True, 39.69),
    ],
)
def test_published_counts_of_vit_large(schedule, fusion, gmac):
    """Blocks alone, ViT-L/16 at 224 px; the issue's figures."""
    counts = schedule.resolve(196, 24, fusion, prefix=1)
    total = sum(flops.blocks_macs(attended(counts, 196, fusion, prefix=1), LARGE))
    assert total / 1e9 == pytest.approx(gmac, rel=0.005)


def test_bound_is_the_ratio_of_totals():
    base = flops.Macs(blocks=(100, 100), products=40, patch_embed=10, head=6)
    pruned = flops.Macs(blocks=(100, 40), products=20, patch_embed=10, head=6, scoring=4)
    assert base.total == 216
    assert flops.bound(base, pruned) == pytest.approx(216 / 160)


# timm hosts against torch's counter ----------------------------------------------------------------------------------

HOSTS = {
    "cls": ("vit_tiny_patch16_224", {"depth": 3, "img_size": 64}, 64),
    "gap": ("vit_medium_patch16_gap_256", {"depth": 2, "img_size": 64}, 64),
    "average pool with cls": ("vit_tiny_patch16_224", {"depth": 2, "img_size": 64, "global_pool": "avg"}, 64),
    "registers, LayerScale": ("vit_small_patch14_reg4_dinov2", {"depth": 2, "img_size": 56}, 56),
    "distilled, two heads": ("deit_tiny_distilled_patch16_224", {"depth": 2, "img_size": 64}, 64),
    "dynamic size": ("vit_tiny_patch16_224", {"depth": 2, "dynamic_img_size": True}, 96),
    "parallel, one projection": (
        "vit_tiny_patch16_224",
        {"depth": 2, "img_size": 64, "block_fn": ParallelScalingBlock},
        64,
    ),
    "parallel, two of each": (
        "vit_tiny_patch16_224",
        {"depth": 2, "img_size": 64, "block_fn": ParallelThingsBlock},
        64,
    ),
    "eva, packed SwiGLU": ("eva02_tiny_patch14_224", {"depth": 2, "img_size": 56}, 56),
    "eva, SwiGLU with norm": (
        "eva02_base_patch14_224",
        {"depth": 2, "img_size": 56, "embed_dim": 96, "num_heads": 3},
        56,
    ),
}


@pytest.mark.parametrize("host", HOSTS)
def test_host_agrees_with_the_counter(host):
    name, arguments, size = HOSTS[host]
    model = timm.create_model(name, num_classes=10, **arguments)
    assert flops.macs(model, size).total == pytest.approx(counted(model, size), rel=0.01)


@pytest.mark.parametrize("fusion", ["none", "llf"])
@pytest.mark.parametrize("reducer", ["cropr", "random", "variance", "attn_topk"])
def test_pruned_model_agrees_with_the_counter(reducer, fusion):
    host = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=4, img_size=96)
    model = cropr.prune(host, Schedule.constant(8), reducer=reducer, fusion=fusion)
    assert flops.macs(model).total == pytest.approx(counted(model.deploy(), 96), rel=0.01)


def test_training_only_parts_are_free():
    host = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=4, img_size=64)
    options = {"num_queries": 9, "num_heads": 3, "qkv_proj": True}
    model = cropr.prune(host, Schedule.constant(2), reducer="cropr", reducer_options=options)
    # 16 patches, then 13, 11, 9: three modules score what their block left
    assert flops.macs(model).scoring == (17 + 14 + 12) * 192
    assert flops.macs(model) == flops.macs(model.deploy())


def test_aligned_schedule_pays_only_for_reducers_that_run():
    host = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=4, img_size=64)
    model = cropr.prune(host, Schedule.constant(2, align=8), reducer="cropr")
    # 17 tokens, CLS included: 14, 12 and 10 are rounded up to 16, 16 and 16
    assert flops.macs(model).scoring == 17 * 192


def test_other_image_size_of_a_dynamic_host():
    host = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=3, dynamic_img_size=True)
    model = cropr.prune(host, Schedule.constant(8), reducer="cropr")
    assert flops.macs(model, 96).total == pytest.approx(counted(model, 96), rel=0.01)


def test_vit_large_needs_no_weights():
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224.mae", num_classes=1000)
    cost = flops.macs(model)
    assert flops.block_dims(model.blocks[0]) == LARGE
    assert sum(cost.blocks) / 1e9 == pytest.approx(61.40, rel=0.005)
    assert cost.patch_embed == 196 * 16 * 16 * 3 * 1024
    assert cost.head == 1024 * 1000


def test_refuses_another_image_size():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="built for 224 px, not 384; build it with img_size=384"):
        flops.macs(model, 384)


def test_refuses_unknown_parts_by_name():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=1, global_pool="map")
        with pytest.raises(ValueError, match="AttentionPoolLatent"):
            flops.macs(model)
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
        model.blocks[0].mlp = torch.nn.Conv2d(192, 192, 1)
        with pytest.raises(ValueError, match=r"FLOPs of Block with \['Conv2d'\]"):
            flops.macs(model)
        model.blocks[0] = torch.nn.Linear(192, 192)
    with pytest.raises(ValueError, match="FLOPs of Linear"):
        flops.macs(model)


def test_bounds_of_the_paper():
    """Reference: 1.78x, 1.91x and 1.63x, from block MACs; patch embedding and scoring shift them by less than 0.5 %."""
    with torch.device("meta"):
        host = timm.create_model("vit_large_patch16_224", num_classes=1000)
        base = flops.macs(host)
        stages = Schedule.stages({6: 50, 12: 50, 18: 50})
        rows = {(Schedule.constant(8), "llf"): 1.78, (Schedule.constant(8), "none"): 1.91, (stages, "none"): 1.63}
        for (schedule, fusion), published in rows.items():
            model = cropr.prune(host, schedule, reducer="cropr", fusion=fusion)
            assert flops.bound(base, flops.macs(model)) == pytest.approx(published, rel=0.005)
