"""Properties that every pruner has, and the rule of each."""

from __future__ import annotations

import inspect

import pytest
import torch

from cropr.pruning.methods import REDUCERS
from cropr.pruning.model import patch_variance
from cropr.pruning.reducers import Context, Reducer, create
from cropr.pruning.reducers.base import select
from cropr.pruning.tokens import Tokens
from cropr.specs import PruneSpec

DIM, PATCHES = 8, 20
PRUNERS = [name for name, method in REDUCERS.items() if name != "none" and method.family == "pruner"]
DETERMINISTIC = [name for name in PRUNERS if name != "random"]


def _case(batch: int = 3, prefix: int = 1) -> tuple[Tokens, Context]:
    tokens = Tokens.full(torch.randn(batch, prefix + PATCHES, DIM), prefix)
    return tokens, Context(torch.rand(batch, 2, PATCHES), pixels=torch.rand(batch, PATCHES))


def _reducer(name: str, training: bool = False) -> torch.nn.Module:
    return create(name, DIM, 4).train(training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("name", PRUNERS)
def test_kept_and_pruned_partition_the_tokens(name, prefix, training):
    tokens, context = _case(prefix=prefix)
    reduction = _reducer(name, training)(tokens, 7, context, want_pruned=True)
    kept, pruned = reduction.kept, reduction.pruned
    assert kept.num_patches == 7
    assert _reducer(name, training)(tokens, 7, context, want_pruned=False).pruned is None
    assert torch.equal(kept.x[:, :prefix], tokens.x[:, :prefix])
    assert torch.equal(torch.cat((kept.index, pruned.index), 1).sort(1).values, tokens.index)
    assert torch.equal(kept.append([pruned]).raster().x, tokens.x)
    assert (kept.index.diff(dim=1) > 0).all(), "survivors stay in raster order"


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_an_image_is_pruned_the_same_in_any_batch(name):
    tokens, context = _case()
    reducer = _reducer(name)
    together = reducer(tokens, 7, context, want_pruned=False).kept.index
    for b in range(3):
        one = Tokens(tokens.x[b : b + 1], tokens.index[b : b + 1], 1)
        alone = Context(context.cls_attention[b : b + 1], pixels=context.pixels[b : b + 1])
        assert torch.equal(reducer(one, 7, alone, want_pruned=False).kept.index, together[b : b + 1])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_permuting_the_patches_permutes_the_kept_set(name):
    tokens, context = _case()
    reducer = _reducer(name)
    order = torch.stack([torch.randperm(PATCHES) for _ in range(3)])
    moved = Context(context.cls_attention.gather(2, order[:, None].expand(-1, 2, -1)), pixels=context.pixels)
    plain = reducer(tokens, 7, context, want_pruned=False).kept
    permuted = reducer(tokens.keep(order), 7, moved, want_pruned=False).kept
    assert torch.equal(plain.index.sort(1).values, permuted.index.sort(1).values)


@pytest.mark.parametrize("name", PRUNERS)
def test_the_deployed_form_keeps_the_same_tokens_to_the_bit(name):
    tokens, context = _case()
    reducer = _reducer(name)
    torch.manual_seed(0)
    trained = reducer(tokens, 7, context, want_pruned=True)
    torch.manual_seed(0)
    deployed = reducer.deploy()(tokens, 7, context, want_pruned=True)
    assert torch.equal(trained.kept.index, deployed.kept.index)
    assert torch.equal(trained.kept.x, deployed.kept.x)
    assert torch.equal(trained.pruned.x, deployed.pruned.x)


@pytest.mark.parametrize("name", PRUNERS)
def test_pruned_tokens_get_no_gradient(name):
    tokens, context = _case(batch=1)
    x = tokens.x.clone().requires_grad_()
    reduction = _reducer(name, training=True)(tokens.replace(x), 7, context, want_pruned=True)
    reduction.kept.x.sum().backward()
    touched = x.grad[0, 1:].abs().sum(-1) > 0
    assert torch.equal(touched.nonzero()[:, 0], reduction.kept.index[0])


def test_training_and_evaluation_of_cropr_select_the_same_tokens():
    tokens, context = _case()
    reducer = create("cropr", DIM, 4, num_queries=5, num_heads=2, qkv_proj=True, norm=True)
    trained = reducer.train()(tokens, 7, context, want_pruned=False).kept.index
    assert torch.equal(trained, reducer.eval()(tokens, 7, context, want_pruned=False).kept.index)


def test_selection_keeps_the_highest_scores():
    tokens, _ = _case()
    score = torch.stack([torch.randperm(PATCHES) for _ in range(3)]).float()
    kept = select(tokens, score, 7, want_pruned=False).kept.index
    assert (score.gather(1, kept) >= PATCHES - 7).all()


def test_non_salient_keeps_the_complement_of_cropr():
    tokens, context = _case()
    cropr, inverted = _reducer("cropr"), _reducer("non_salient")
    inverted.load_state_dict(cropr.state_dict())
    best = cropr(tokens, PATCHES // 2, context, want_pruned=False).kept.index
    worst = inverted(tokens, PATCHES // 2, context, want_pruned=False).kept.index
    assert torch.equal(torch.cat((best, worst), 1).sort(1).values, tokens.index)


def test_random_keeps_every_place_equally_often():
    draws, keep = 4000, 7
    tokens = Tokens.full(torch.zeros(draws, 1 + PATCHES, 1), 1)
    torch.manual_seed(0)
    kept = _reducer("random")(tokens, keep, Context(), want_pruned=False).kept.index
    frequency = torch.bincount(kept.flatten(), minlength=PATCHES) / draws
    share = keep / PATCHES
    assert (frequency - share).abs().max() < 4 * (share * (1 - share) / draws) ** 0.5


def test_random_follows_the_seed():
    tokens, context = _case()
    reducer = _reducer("random")
    kept = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        kept.append(reducer(tokens, 7, context, want_pruned=False).kept.index)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_sampling_explores_in_training_and_not_in_evaluation():
    tokens, context = _case()
    reducer = create("cropr", DIM, 4, selector="sample")

    def kept() -> torch.Tensor:
        return reducer(tokens, 7, context, want_pruned=False).kept.index

    reducer.train()
    assert any(not torch.equal(kept(), kept()) for _ in range(5))
    reducer.eval()
    assert torch.equal(kept(), kept())


def test_variance_prunes_flat_patches_and_ignores_brightness_and_contrast():
    images = torch.rand(2, 3, 32, 40)
    images[:, :, 8:16, 16:24] = 0.3
    variance = patch_variance(images, (4, 5))
    torch.testing.assert_close(variance[0, 5], images[0, :, 8:16, 0:8].var())
    assert variance.shape == (2, 20)
    flat = 1 * 5 + 2
    assert (variance.argmin(dim=1) == flat).all()
    rescaled = patch_variance(images * 3 + 1, (4, 5))
    assert torch.equal(rescaled.argsort(dim=1), variance.argsort(dim=1))


@pytest.mark.parametrize("name", [name for name in REDUCERS if name != "none"])
def test_an_entry_lists_the_options_of_its_class(name):
    """Options are the keyword-only parameters of the class, and no option is unknown to a specification."""
    method = REDUCERS[name]
    kind = method.load()
    makers = [parent.__init__ for parent in kind.__mro__ if "__init__" in vars(parent) and issubclass(parent, Reducer)]
    found = [p for maker in makers for p in inspect.signature(maker).parameters.values() if p.kind is p.KEYWORD_ONLY]
    defaults = {p.name: p.default for p in found if p.name not in kind.told}
    if len(kind.places) == 1:
        del defaults["place"]
    assert set(method.options) == set(defaults)
    assert set(method.training_only) <= set(method.options)
    assert (method.place or "after_block") == kind.places[0]
    assert PruneSpec(reducer=name, options=defaults).options == defaults
