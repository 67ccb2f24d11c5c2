"""Properties of all reducers, by family; what pruners have alone, the rule of each pruner; tokens; Cropr's scorer."""

import inspect
import itertools
from dataclasses import replace

import pytest
import torch
from cases import DIM, KEEP, PATCHES, PRUNERS, RULES, case, make, randomised, read, run

from cropr.pruning.methods import REDUCERS
from cropr.pruning.model import patch_variance
from cropr.pruning.reducers import Context, Reducer, create
from cropr.pruning.reducers.base import select
from cropr.pruning.reducers.select import Cropr
from cropr.pruning.scorer import Aggregator, FoldedScorer, Scorer
from cropr.pruning.tokens import Tokens, take
from cropr.specs import PruneSpec

ALL = [*((name, {}) for name in PRUNERS), *RULES]
NAMES = list(dict.fromkeys(name for name, _ in ALL if name != "random"))
AVERAGING = [
    *(rule for rule in RULES if rule[0] in ("tome", "pitome", "k_medoids", "dpc_knn", "sit")),
    ("evit", {"rule": "corrected"}),
    ("patch_merger", {}),
]
each = pytest.mark.parametrize(("name", "options"), ALL, ids=str)


@each
@torch.no_grad()
def test_counts_prefix_and_where_each_patch_went(name, options):
    """K tokens; a prefix that is the same to the bit; every patch in one token, or in none where patches are pruned."""
    for prefix in (0, 1, 5):
        tokens, context = case(prefix=prefix)
        kept = run(name, tokens, context, **options)
        assert kept.num_patches == KEEP
        assert torch.equal(kept.x[:, :prefix], tokens.x[:, :prefix])
        assert (kept.index is None) == (REDUCERS[name].family == "slots")
        if REDUCERS[name].family != "merger":
            assert kept.source is None
            continue
        holds = torch.stack([torch.bincount(row, minlength=KEEP) for row in kept.source])  # fails for -1: none is lost
        assert holds.sum(dim=1).tolist() == [PATCHES] * 3
        assert (holds > 0).all()
        assert torch.equal(kept.source.gather(1, kept.index), torch.arange(KEEP).expand(3, -1)), "a centre is a member"
        assert kept.size is None or torch.equal(kept.size, holds.float())


@pytest.mark.parametrize("name", [n for n in NAMES if REDUCERS[n].family in ("pruner", "merger") and n != "evit"])
def test_with_as_many_tokens_as_there_are_nothing_changes(name):
    """To the bit, or for clusters, to the order. EViT would fuse one token: a model does not call it then."""
    tokens, context = case()
    kept = run(name, tokens, context, PATCHES, **({"weights": "equal"} if name == "dpc_knn" else {}))
    assert torch.equal(kept.index.sort(dim=1).values, tokens.index)
    torch.testing.assert_close(kept.raster().x, tokens.x, rtol=2e-6 if name == "dpc_knn" else 0, atol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("tome", "tofu", "ats")])
@torch.no_grad()
def test_the_order_of_the_patches_does_not_matter(name):
    """As a set. ToMe and ToFu split by place, ATS sums in order of place: these differ."""
    tokens, context = case()
    order = torch.randperm(PATCHES)
    moved = replace(
        context,
        cls_attention=context.cls_attention[:, :, order],
        mean_key=torch.cat((context.mean_key[:, :1], context.mean_key[:, 1:][:, order]), dim=1),
        column_sums=context.column_sums[:, order],
    )
    plain = run(name, tokens, context).patches
    permuted = run(name, tokens.keep(order.expand(3, -1)), moved).patches
    if REDUCERS[name].family != "slots":
        plain, permuted = (x.gather(1, x[:, :, :1].argsort(dim=1).expand_as(x)) for x in (plain, permuted))
    torch.testing.assert_close(plain, permuted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), AVERAGING, ids=str)
@torch.no_grad()
def test_an_average_of_equal_tokens_is_that_token(name, options):
    tokens, context = case()
    same = tokens.replace(torch.randn(3, 1, DIM).expand_as(tokens.x).contiguous())
    fixed = make(name).norm(same.patches) if name == "patch_merger" else same.patches
    x = run(name, same, context, **options).patches
    torch.testing.assert_close(x, fixed[:, :1].expand_as(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_mass_is_conserved_over_many_merges():
    for name in ("tome", "pitome", "tofu"):
        tokens, context = case(patches=40)
        total = tokens.patches.sum(dim=1)
        for keep in (33, 26, 19, 12, 3):
            context = replace(context, mean_key=torch.randn(3, tokens.x.shape[1], 4))
            tokens = run(name, tokens, context, keep)
            assert tokens.size.sum(dim=1).tolist() == [40] * 3
            mass = (tokens.size[..., None] * tokens.patches).sum(dim=1)
            assert name == "tofu" or torch.allclose(mass, total, rtol=1e-5, atol=1e-4)
        holds = torch.stack([torch.bincount(row, minlength=3) for row in tokens.source])
        assert torch.equal(holds.float(), tokens.size)


@each
@torch.no_grad()
def test_the_deployed_form_gives_the_same_tokens_to_the_bit(name, options):
    tokens, context = case()
    reducer = make(name, **options)
    found = []
    for form in (reducer, reducer.deploy()):
        torch.manual_seed(0)
        found.append(form(tokens, KEEP, read(reducer, context), want_pruned=False).kept.x)
    assert torch.equal(*found)
    low = reducer.deploy().bfloat16()
    x = low(tokens.replace(tokens.x.bfloat16()), KEEP, read(reducer, context), want_pruned=False).kept.x
    assert x.dtype == torch.bfloat16
    assert x.isfinite().all()
    assert not any(part in name for name, _ in reducer.deploy().named_parameters() for part in reducer.training_only)


@each
def test_a_gradient_reaches_what_is_in_the_output_and_nothing_else(name, options):
    tokens, context = case(batch=1)
    x = tokens.x.clone().requires_grad_()
    reducer = make(name, **options)
    kept = reducer(tokens.replace(x), KEEP, read(reducer, context), want_pruned=False).kept
    (kept.patches if kept.valid is None else kept.patches[kept.valid]).square().sum().backward()
    touched = set((x.grad[0, 1:].abs().sum(dim=1) > 0).nonzero()[:, 0].tolist())
    chooses = name in ("k_medoids", "ats", "dynamic_vit", *PRUNERS) or (name == "tofu" and reducer.depth <= 0.5)
    assert touched == (set(kept.index[0].tolist()) if chooses else set(range(PATCHES)))
    if REDUCERS[name].trained and not chooses and options.get("weights") != "equal":
        assert all(weight.grad is not None and weight.grad.any() for weight in reducer.parameters())


def test_dynamic_vit_draws_by_its_probabilities_and_learns_from_both_losses():
    tokens, _ = case(batch=2000)
    reducer = make("dynamic_vit").train()
    found = reducer(tokens, KEEP, Context(), want_pruned=False)
    gate, stay = found.kept.gate, reducer.logits(tokens.patches, None).exp()[:, :, 0]
    assert found.kept.num_patches == PATCHES
    assert set(gate.detach().unique().tolist()) <= {0.0, 1.0}
    assert abs(float(gate.detach().mean() - stay.detach().mean())) < 4 * 0.5 / gate.numel() ** 0.5
    expected = 2 * (gate.mean(dim=1) - KEEP / PATCHES).square().mean()
    torch.testing.assert_close(found.losses["ratio"], expected)
    for loss in (found.losses["ratio"], (gate * tokens.patches.sum(dim=2)).sum()):
        reducer.zero_grad()
        loss.backward(retain_graph=True)
        assert all(weight.grad.any() for weight in reducer.parameters())
    again = reducer(found.kept, 5, Context(), want_pruned=False).kept
    assert (again.gate <= gate).all(), "what was dropped stays dropped"
    alive = gate > 0
    x = torch.where(alive[..., None], tokens.patches, torch.randn_like(tokens.patches))
    torch.testing.assert_close(reducer.logits(x, gate)[alive], reducer.logits(tokens.patches, gate)[alive])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PRUNERS)
def test_kept_and_pruned_partition_the_tokens(name, training):
    for prefix in (0, 1, 5):
        tokens, context = case(prefix=prefix)
        reducer = make(name).train(training)
        reduction = reducer(tokens, 7, context, want_pruned=True)
        kept, pruned = reduction.kept, reduction.pruned
        assert reducer(tokens, 7, context, want_pruned=False).pruned is None
        assert torch.equal(torch.cat((kept.index, pruned.index), 1).sort(1).values, tokens.index)
        assert torch.equal(kept.append([pruned]).raster().x, tokens.x)
        assert (kept.index.diff(dim=1) > 0).all(), "survivors stay in raster order"


def test_cropr_selects_the_same_tokens_in_training_unless_it_samples():
    tokens, context = case()

    def kept(reducer) -> torch.Tensor:
        return reducer(tokens, 7, context, want_pruned=False).kept.index

    plain = make("cropr", num_queries=5, num_heads=2, qkv_proj=True, norm=True)
    assert torch.equal(kept(plain.train()), kept(plain.eval()))
    sampling = make("cropr", selector="sample").train()
    assert any(not torch.equal(kept(sampling), kept(sampling)) for _ in range(5))
    sampling.eval()
    assert torch.equal(kept(sampling), kept(sampling))


def test_selection_keeps_the_highest_scores_and_non_salient_the_complement():
    tokens, context = case()
    score = torch.stack([torch.randperm(PATCHES) for _ in range(3)]).float()
    kept = select(tokens, score, 7, want_pruned=False).kept.index
    assert (score.gather(1, kept) >= PATCHES - 7).all()
    cropr, inverted = make("cropr"), make("non_salient")
    inverted.load_state_dict(cropr.state_dict())
    halves = [one(tokens, PATCHES // 2, context, want_pruned=False).kept.index for one in (cropr, inverted)]
    assert torch.equal(torch.cat(halves, 1).sort(1).values, tokens.index)


def test_random_keeps_every_place_equally_often_and_follows_the_seed():
    draws, keep = 4000, 7
    tokens, reducer, found = Tokens.full(torch.zeros(draws, 1 + PATCHES, 1), 1), make("random"), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(reducer(tokens, keep, Context(), want_pruned=False).kept.index)
    frequency = torch.bincount(found[0].flatten(), minlength=PATCHES) / draws
    share = keep / PATCHES
    assert (frequency - share).abs().max() < 4 * (share * (1 - share) / draws) ** 0.5
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


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


@pytest.mark.parametrize("x", [torch.randn(4, 9, 3), torch.randn(4, 10, 6)[:, 1:, ::2]], ids=["plain", "strided"])
def test_take_is_indexing_and_passes_gradients_to_the_rows_taken_only(x):
    rows = torch.stack([torch.randperm(9)[:5] for _ in range(4)])
    x = x.clone().requires_grad_()
    taken = take(x, rows)
    assert torch.equal(taken, torch.stack([image[row] for image, row in zip(x, rows, strict=True)]))
    taken.sum().backward()
    assert torch.equal(x.grad[..., 0], torch.zeros(4, 9).scatter(1, rows, 1.0))


WIDE = 24
VARIANTS = [
    {"num_queries": queries, "num_heads": heads, "qkv_proj": proj, "norm": norm}
    for queries, heads, proj, norm in itertools.product([1, 7], [1, 4], [False, True], [False, True])
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_folded_scores_rank_as_all_queries_and_heads_do(options):
    scorer = randomised(Scorer(WIDE, **options)).double()
    x = torch.randn(2, 30, WIDE, dtype=torch.float64)
    logits, _ = scorer(x)
    full = logits.sum(dim=(1, 2))
    folded = scorer.fold()(x).double()
    difference = full - folded
    # Biases add the same to every token: a constant, which no ranking sees.
    assert difference.std(dim=1).max() < 1e-4 * full.std()
    assert torch.equal(full.argsort(dim=1), folded.argsort(dim=1))


def test_folded_score_is_float32_under_autocast_and_queries_start_truncated_at_two_sigma():
    scorer, x = FoldedScorer(torch.randn(WIDE)), torch.randn(2, 9, WIDE)
    with torch.autocast("cpu", torch.bfloat16):
        under = scorer(x)
    assert under.dtype == torch.float32
    assert torch.equal(under, scorer(x))
    queries = Scorer(1024, num_queries=64).queries.detach()
    assert queries.std() == pytest.approx(1024**-0.5 * 0.88, rel=0.02)
    assert queries.abs().max() <= 2 * 1024**-0.5


def test_aggregator_is_softmax_attention_whose_heads_attend_to_their_own_channels():
    x, logits = torch.randn(2, 9, WIDE), torch.randn(2, 1, 3, 9)
    z = Aggregator(WIDE, mlp=False)(logits, x)
    torch.testing.assert_close(z, (logits[:, 0] / WIDE**0.5).softmax(-1) @ x)
    aggregator = Aggregator(WIDE, num_heads=4, mlp=False)
    torch.nn.init.eye_(aggregator.out_proj.weight)
    torch.nn.init.zeros_(aggregator.out_proj.bias)
    logits = torch.zeros(2, 4, 1, 9)
    logits[:, 2, 0, 5] = 1e4
    z = aggregator(logits, x)[0, 0]
    torch.testing.assert_close(z[12:18], x[0, 5, 12:18])
    torch.testing.assert_close(z[:12], x[0, :, :12].mean(0))


def _train_step(**options) -> tuple[Tokens, Cropr]:
    reducer = create("cropr", WIDE, 10, **options).train()
    assert isinstance(reducer, Cropr)
    x = torch.randn(2, 13, WIDE, requires_grad=True)
    return Tokens.full(x, 1), reducer


def test_gradients_of_auxiliary_and_main_loss_stop_where_they_should():
    tokens, reducer = _train_step()
    reducer(tokens, 5, Context(), want_pruned=False).aux.square().sum().backward()
    assert tokens.x.grad is None
    assert reducer.scorer.queries.grad.abs().sum() > 0
    tokens, reducer = _train_step()
    reducer(tokens, 5, Context(), want_pruned=False).kept.x.square().sum().backward()
    assert tokens.x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in reducer.parameters())
    tokens, reducer = _train_step(stop_gradient=False)
    reducer(tokens, 5, Context(), want_pruned=False).aux.square().sum().backward()
    assert tokens.x.grad.abs().sum() > 0


def test_options_that_cannot_be_are_refused_by_name():
    wrong = {"num_queries=0": {"num_queries": 0}, "does not divide the width 24": {"num_heads": 5}}
    for says, options in (wrong | {"unknown selector 'best'": {"selector": "best"}}).items():
        with pytest.raises(ValueError, match=says):
            create("cropr", WIDE, 10, **options)
