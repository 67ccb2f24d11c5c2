"""The Cropr module: one vector scores like many queries, and gradients stop where the paper stops them."""

import itertools

import pytest
import torch
from cases import randomised

from cropr.pruning.reducers import Context, create
from cropr.pruning.reducers.select import Cropr
from cropr.pruning.scorer import Aggregator, FoldedScorer, Scorer
from cropr.pruning.tokens import Tokens

DIM = 24
VARIANTS = [
    {"num_queries": queries, "num_heads": heads, "qkv_proj": proj, "norm": norm}
    for queries, heads, proj, norm in itertools.product([1, 7], [1, 4], [False, True], [False, True])
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_folded_scores_rank_as_all_queries_and_heads_do(options):
    scorer = randomised(Scorer(DIM, **options)).double()
    x = torch.randn(2, 30, DIM, dtype=torch.float64)
    logits, _ = scorer(x)
    full = logits.sum(dim=(1, 2))
    folded = scorer.fold()(x).double()
    difference = full - folded
    # Biases add the same to every token: a constant, which no ranking sees.
    assert difference.std(dim=1).max() < 1e-4 * full.std()
    assert torch.equal(full.argsort(dim=1), folded.argsort(dim=1))


def test_folded_score_is_float32_under_autocast_and_queries_start_truncated_at_two_sigma():
    scorer, x = FoldedScorer(torch.randn(DIM)), torch.randn(2, 9, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        under = scorer(x)
    assert under.dtype == torch.float32
    assert torch.equal(under, scorer(x))
    queries = Scorer(1024, num_queries=64).queries.detach()
    assert queries.std() == pytest.approx(1024**-0.5 * 0.88, rel=0.02)
    assert queries.abs().max() <= 2 * 1024**-0.5


def test_aggregator_is_softmax_attention_whose_heads_attend_to_their_own_channels():
    x, logits = torch.randn(2, 9, DIM), torch.randn(2, 1, 3, 9)
    z = Aggregator(DIM, mlp=False)(logits, x)
    torch.testing.assert_close(z, (logits[:, 0] / DIM**0.5).softmax(-1) @ x)
    aggregator = Aggregator(DIM, num_heads=4, mlp=False)
    torch.nn.init.eye_(aggregator.out_proj.weight)
    torch.nn.init.zeros_(aggregator.out_proj.bias)
    logits = torch.zeros(2, 4, 1, 9)
    logits[:, 2, 0, 5] = 1e4
    z = aggregator(logits, x)[0, 0]
    torch.testing.assert_close(z[12:18], x[0, 5, 12:18])
    torch.testing.assert_close(z[:12], x[0, :, :12].mean(0))


def _train_step(**options) -> tuple[Tokens, Cropr]:
    reducer = create("cropr", DIM, 10, **options).train()
    assert isinstance(reducer, Cropr)
    x = torch.randn(2, 13, DIM, requires_grad=True)
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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_queries": 0}, "num_queries=0"),
        ({"num_heads": 5}, "does not divide the width 24"),
        ({"selector": "best"}, "unknown selector 'best'"),
        ({"heads": 2}, "no option heads; it has .*num_heads"),
    ],
)
def test_errors_name_value_limit_and_fix(options, says):
    with pytest.raises(ValueError, match=says):
        create("cropr", DIM, 10, **options)
