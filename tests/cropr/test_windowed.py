"""Windowed and global blocks: order, rotary rows, chunks of survivors, refusals, fusion, gradients."""

import pytest
import torch
from cases import host_of, pictures
from timm.layers import build_rotary_pos_embed
from torch import Tensor, nn

import cropr
from cropr.pruning.backbones import windowed
from cropr.pruning.backbones.windows import window_order
from cropr.pruning.model import PrunedViT
from cropr.pruning.schedule import Schedule

GLOBAL = (2, 4, 6)
"""Of six blocks."""
WINDOW = 2
SMALL = {"img_size": (32, 48), "patch_size": 4, "depth": 6, "num_classes": 0, "class_token": False}
SMALL |= {"global_pool": "avg", "dynamic_img_size": True}
HOSTS = ("vit", "eva", "eva-without-reference-grid", "eva-fixed-size")
PRUNE = Schedule.kept({1: 60, 2: 20, 3: 16})


def _host(name: str) -> nn.Module:
    host = host_of(name.partition("-")[0], **{**SMALL, "dynamic_img_size": name != "eva-fixed-size"})
    if name == "eva-without-reference-grid":  # create_model drops arguments that are None
        host.rope.ref_feat_shape = None
    return host


def _images(batch: int = 2, height: int = 32, width: int = 48) -> Tensor:
    return pictures(batch, height, width)


def _pruned(name: str, schedule: Schedule = PRUNE, fusion: str = "llf") -> PrunedViT:
    backbone = windowed(_host(name), WINDOW, GLOBAL)
    return cropr.prune(backbone, schedule, fusion=fusion, num_outputs=3).eval()


def _local_table(host: nn.Module, rows: int, columns: int) -> Tensor:
    """EVA-02's window table written out: coordinates start again in every window and span the reference grid."""
    rope = host.rope
    sine, cosine = build_rotary_pos_embed(
        [WINDOW, WINDOW], bands=rope.bands, dim=rope.dim, in_pixels=False, ref_feat_shape=rope.ref_feat_shape
    )
    table = torch.cat((sine, cosine), dim=-1).view(WINDOW, WINDOW, -1)
    return table.repeat(rows // WINDOW, columns // WINDOW, 1).flatten(0, 1)


def _reference(name: str, images: Tensor) -> Tensor:
    """The dense windowed host by its definition: raster order, a mask of equal windows, tables local to a window."""
    host = _host(name)
    rows, columns = images.shape[-2] // 4, images.shape[-1] // 4
    place = torch.arange(rows * columns)
    window = place // columns // WINDOW * columns + place % columns // WINDOW
    same = window[:, None] == window[None, :]
    if name == "vit":
        x, rope = host.norm_pre(host._pos_embed(host.patch_embed(images))), None
    else:
        x, rope = host._pos_embed(host.patch_embed(images))
    for number, block in enumerate(host.blocks, start=1):
        everywhere = number in GLOBAL
        mask = None if everywhere else same
        if rope is None:
            x = block(x, attn_mask=mask)
        else:
            x = block(x, rope=rope if everywhere else _local_table(host, rows, columns), attn_mask=mask)
    return host.norm(x)


def test_window_order_by_hand():
    assert window_order(4, 4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert window_order(2, 6, 2).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    trace = _pruned("vit", Schedule.kept({5: 61}), "none").token_trace
    assert trace == (96, 96, 96, 96, 96, 61, 61), "any count may enter a global block"


@pytest.mark.parametrize("name", HOSTS)
def test_without_pruning_it_is_the_dense_windowed_model(name):
    """And to the bit the same with and without a reducer and fusion."""
    plain = cropr.prune(windowed(_host(name), WINDOW, GLOBAL), Schedule.constant(0), reducer="none").eval()
    x = plain(_images()).tokens.raster().x
    torch.testing.assert_close(x, _reference(name, _images()), rtol=1e-4, atol=1e-5)
    for fusion in ("none", "llf"):
        assert torch.equal(x, _pruned(name, Schedule.kept({1: 96}), fusion)(_images()).tokens.raster().x)


@pytest.mark.parametrize("name", ["vit", "eva"])
def test_chunks_of_survivors_equal_masked_attention(name):
    """A windowed block on 60 survivors against one masked attention over them, with each token's own rotary row."""
    backbone = windowed(_host(name), WINDOW, GLOBAL)
    tokens, position = backbone.embed(_images())
    survivors = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(b))[:60] for b in range(2)])
    tokens = tokens.keep(survivors.sort(dim=1).values)
    chunk = torch.arange(60) // WINDOW**2
    mask = chunk[:, None] == chunk[None, :]
    block = backbone.host.blocks[2]
    if name == "vit":
        expected = block(tokens.x, attn_mask=mask)
    else:
        rope = torch.stack([position[1][index] for index in tokens.index])[:, None]
        expected = block(tokens.x, rope=rope, attn_mask=mask)
    torch.testing.assert_close(backbone.run(3, tokens, position).x, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "eva"])
def test_survivors_stay_in_window_major_order_and_a_result_does_not_depend_on_the_batch(name):
    model = _pruned(name)
    output = model(_images(3))
    rank = window_order(8, 12, WINDOW).argsort()
    assert [index.shape[1] for index in output.kept.values()] == [60, 20, 16]
    assert all((rank[index].diff(dim=1) > 0).all() for index in output.kept.values())
    for b in range(3):
        alone = model(_images(3)[b : b + 1])
        torch.testing.assert_close(alone.tokens.raster().x, output.tokens.raster().x[b : b + 1], rtol=1e-4, atol=1e-5)
        assert torch.equal(alone.pruned_after(96), output.pruned_after(96)[b : b + 1])


@pytest.mark.parametrize("name", ["vit", "eva"])
def test_fusion_restores_the_raster(name):
    """With every block but the embedding skipped, tokens that were pruned and fused are where they came from."""
    model = _pruned(name)
    for block in model.backbone.host.blocks:
        block.forward = lambda x, **_: x
    tokens = model(_images()).tokens.raster()
    assert torch.equal(tokens.index, torch.arange(96).expand(2, -1))
    embedded, _ = model.backbone.embed(_images())
    torch.testing.assert_close(tokens.x, model.backbone.norm(embedded).raster().x, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit", "eva"])
def test_other_image_sizes_and_deployment(name):
    model = _pruned(name)
    images = _images(1, 64, 40)
    fast = model.deploy().detailed(images)
    slow = model(images)
    assert slow.tokens.num_patches == 160
    torch.testing.assert_close(fast.tokens.x, slow.tokens.x, rtol=0, atol=1e-6)
    assert all(torch.equal(fast.kept[block], slow.kept[block]) for block in slow.kept)


def test_checkpointing_changes_nothing():
    model, gradients = _pruned("eva").train(), []
    for enable in (False, True):
        model.zero_grad()
        model.backbone.host.set_grad_checkpointing(enable)
        model(_images()).tokens.x.square().mean().backward()
        gradients.append(model.backbone.host.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: _pruned("vit", Schedule.kept({2: 61})), r"keep a multiple of 4, here 60 or 64"),
        (lambda: windowed(_host("vit"), WINDOW, (2,)), "lack the last one, 6"),
        (lambda: windowed(_host("vit"), WINDOW, (0, 6, 7)), r"\[0, 7\]: blocks count from 1 to 6"),
        (lambda: windowed(host_of("vit", **{**SMALL, "class_token": True}), WINDOW, GLOBAL), "class_token=False"),
        (lambda: windowed(host_of("eva-mixed-rope", **SMALL), WINDOW, GLOBAL), "RotaryEmbeddingMixed"),
        (lambda: _pruned("vit")(_images(1, 28, 40)), "pad them to 32 x 40"),
        (lambda: windowed(nn.Linear(2, 2), WINDOW, GLOBAL), "supported"),
    ],
)
def test_refuses_by_name(make, says):
    with pytest.raises((TypeError, ValueError), match=says):
        make()
