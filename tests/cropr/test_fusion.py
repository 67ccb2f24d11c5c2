"""What becomes of pruned tokens: every fusion keeps them all, and does what its docstring says."""

from fractions import Fraction

import pytest
import torch
from cases import SMALL, assert_batchwise, assert_deployed, assert_exports, assert_one_graph, host_of, randomised
from cases import pictures as images
from torch import nn

import cropr
from cropr.pruning.methods import FUSIONS, before_last_block
from cropr.pruning.schedule import Schedule
from cropr.pruning.tokens import Tokens
from cropr.tasks.segmentation.run import PrunedSegmenter

BACK = [name for name in FUSIONS if name != "none"]


def segmenter(fusion, name="eva", schedule=None, reducer="cropr", **arguments):
    schedule = schedule or Schedule.constant(3)
    return randomised_fusion(cropr.prune(host_of(name, **arguments), schedule, reducer, fusion, kind=PrunedSegmenter))


def randomised_fusion(model):
    """Away from zero, where the cross-attention starts."""
    if model.fusion is not None:
        randomised(model.fusion)
    return model.eval()


def parts(batch=2, dim=32):
    """Twelve tokens after a prefix of one, four of them alive, eight pruned after two blocks; in no order."""
    full = Tokens.full(torch.randn(batch, 13, dim), prefix=1)
    order = torch.stack([torch.randperm(12) for _ in range(batch)])
    pruned = {1: full.cut(order[:, 4:9]), 2: full.cut(order[:, 9:])}
    return full, full.keep(order[:, :4]), pruned


@pytest.mark.parametrize(("fusion", "last"), [("llf", 2), ("llf_no_self", 2), ("concat", 3), ("exit", 3), ("none", 3)])
def test_pruning_stops_where_it_would_be_undone_at_once(fusion, last):
    method, model = FUSIONS[fusion], segmenter(fusion)
    assert method.place == (method.load().place if method.path else None)
    assert list(model.reducers) == [str(block) for block in range(1, last + 1)]
    assert model.token_trace[-1] == (17 if before_last_block(fusion) else 7)


@pytest.mark.parametrize("name", BACK)
def test_every_place_comes_back_once_and_nothing_pruned_is_nothing_changed(name):
    full, alive, pruned = parts()
    fusion = FUSIONS[name].load()(32, 32, (1, 2))
    fused = fusion(alive, pruned)
    assert torch.equal(fused.index.sort(dim=1).values, full.index)
    assert torch.equal(fused.x[:, :5], alive.x)  # what is alive stays in front, as it is
    assert fused.prefix == 1
    if name != "exit":  # without parameters, and with cross-attention that starts at zero, they come back as they left
        torch.testing.assert_close(fused.raster().x, full.x, rtol=0, atol=0 if name != "cross" else 1e-6)
    assert (name in ("exit", "cross")) == any(True for _ in fusion.parameters())
    randomised(fusion)
    for none in ({}, {1: Tokens(torch.zeros(2, 0, 32), torch.zeros(2, 0, dtype=torch.int64), 0)}):
        fused = fusion(full, none)
        assert torch.equal(fused.x, full.x)
        assert fusion.mask(full, fused) is None


@pytest.mark.parametrize("host", ["vit", "eva"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_rate_zero_is_the_host_patch_by_patch_and_deployed_is_the_trained_model(host, fusion, attention_calls):
    model = segmenter(fusion, host, Schedule.constant(0), global_pool="avg")
    plain = model.backbone.host
    patches = plain.head(plain.fc_norm(plain.forward_features(images())))[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    expected = nn.functional.interpolate(patches, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images()).logits, expected, rtol=0, atol=1e-6)
    model = segmenter(fusion, host)
    attention_calls.clear()
    model(images())
    assert len(attention_calls) >= SMALL["depth"], "every block stays on fused attention"
    assert sum(call.get("attn_mask") is not None for call in attention_calls) == (fusion == "llf_no_self")
    assert_deployed(model, images())
    assert_batchwise(model, images())


@pytest.mark.parametrize("fusion", BACK)
def test_the_main_loss_reaches_blocks_and_fusion_but_no_query(fusion):
    """In training at share zero, every parameter has a gradient: processes that train together wait for each."""
    model = segmenter(fusion).train()
    model(images()).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.fusion.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in model.reducers.parameters())
    assert model.backbone.host.blocks[0].mlp.fc2.weight.grad.abs().sum() > 0
    model.zero_grad()
    model.ramp(Fraction(0))
    output = model(images())
    (output.logits.sum() + sum(aux.sum() for aux in output.aux)).backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()


@pytest.mark.model
@pytest.mark.parametrize("fusion", FUSIONS)
def test_deployed_is_one_graph_and_exports(fusion):
    """One graph with LLF and without fusion: ``test_model.py``."""
    fast = segmenter(fusion, depth=3).deploy()
    if fusion not in ("none", "llf", "concat"):
        assert_one_graph(fast)
    assert_exports(fast)


def test_mask_by_hand():
    """One prefix token, two survivors, two pruned."""
    full = Tokens.full(torch.zeros(1, 5, 32), prefix=1)
    alive, pruned = full.keep(torch.tensor([[0, 1]])), {1: full.cut(torch.tensor([[2, 3]]))}
    fusion = FUSIONS["llf_no_self"].load()(32, 5, (1,))
    assert fusion.mask(alive, fusion(alive, pruned)).int().tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 1],
    ]


def test_cross_attention_reads_survivors_and_prefix_only():
    _, alive, pruned = parts()
    cross = randomised(FUSIONS["cross"].load()(32, 5, (1, 2)))
    before = cross(alive, pruned).x
    other = {**pruned, 2: pruned[2].replace(pruned[2].x + torch.randn(32))}
    torch.testing.assert_close(cross(alive, other).x[:, :10], before[:, :10])
    prefix = alive.replace(torch.cat((alive.x[:, :1] + torch.randn(32), alive.x[:, 1:]), dim=1))
    assert (cross(prefix, pruned).x - before)[:, 5:].abs().amax(dim=2).min() > 1e-4


def test_an_early_exit_is_final():
    """Logits of a pruned patch are those of its site's head on its state when pruned, whatever happens later."""
    model = segmenter("exit", schedule=Schedule.stages({2: 7}))
    output = model(images())
    tokens, position = model.backbone.embed(images())
    for block in (1, 2):
        tokens = model.backbone.run(block, tokens, position)
    expected = model.fusion.heads["2"](tokens.patches)
    gone = output.pruned_after(16) == 2
    assert gone.sum() == 14
    scores = scores_of(model, images())
    torch.testing.assert_close(scores[gone], expected[gone], rtol=1e-5, atol=1e-5)
    assert (scores - expected)[~gone].abs().max() > 0.1


def scores_of(model, batch):
    """[B, N, classes]: predictions before upsampling, in raster order."""
    seen = []
    interpolate = nn.functional.interpolate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "interpolate", lambda x, *a, **k: seen.append(x) or interpolate(x, *a, **k))
        model(batch)
    return seen[-1].flatten(2).transpose(1, 2)


def test_images_with_one_label_pool_over_all_tokens():
    for fusion in ("concat", "cross", "llf_no_self"):
        model = cropr.prune(host_of("eva"), Schedule.constant(3), fusion=fusion).eval()
        output = model(images())
        assert (output.tokens.num_patches, output.logits.shape) == (16, (2, 5))
        assert_deployed(model, images())
    with pytest.raises(ValueError, match=r"EarlyExit fuses predictions per patch.*such as 'llf'"):
        cropr.prune(host_of("vit"), Schedule.constant(2), fusion="exit")
