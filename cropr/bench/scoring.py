"""What it saves to score tokens with one vector: the deployed model against one that scores all queries, then sums.

A segmenter has a query for every patch. The authors' released inference path computes the logits of all of them, Q N C
multiply-adds a module, before it sums over queries; the paper folds the queries into one vector first, N C. Both models
here share the host and the queries, and take turns with the unpruned model in one process.

B batch, L tokens with prefix, C channels, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from cropr.bench import flops
from cropr.bench.attention import under
from cropr.bench.contest import Case, Outcome, contest
from cropr.bench.device import Unsupported, arithmetic_dtype, check, largest_batch, weights_dtype
from cropr.bench.models import UNPRUNED, build_variants, random_images, token_trace
from cropr.bench.specs import ScoringSpec
from cropr.bench.timing import Tell, against, ratio, speed
from cropr.pruning.model import DeployedViT
from cropr.pruning.reducers import Context, ScoreReducer
from cropr.pruning.reducers.select import FoldedCropr
from cropr.pruning.scorer import Scorer
from cropr.pruning.tokens import Tokens

ONE, ALL = "one_vector", "all_queries"
"""The two pruned models."""

ROUNDING = 100
"""Most that their scores may differ by for rounding alone, in eps of the arithmetic; in fp32, 11 to 18 were seen."""


class AllQueries(ScoreReducer):
    """Logits of every query on every token, summed: what ``FoldedCropr`` makes unnecessary. Nobody should deploy it."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def score(self, tokens: Tokens, context: Context) -> Tensor:
        logits, _ = self.scorer(tokens.x)
        return logits.sum(dim=(1, 2), dtype=torch.float32)[:, tokens.prefix :]


def scoring_cells(spec: ScoringSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """Time the unpruned model and both pruned ones; arguments and errors as of ``cropr.bench.lab.measure``.

    Returns:
        One a model: ``variant``, ``precision``, ``attention``, ``batch_size``, ``tokens``, and
        either ``unsupported`` with the reason, or ``seconds`` (round by round), ``attention_calls`` and ``metrics``:
        ``speedup`` over the unpruned model beside the ``bound`` of its own arithmetic, and of the one vector
        ``over_all_queries``, how many times faster it is than all queries, with its interval, and ``kept_in_both``,
        the share of the kept tokens that both keep.
    """
    common = {"precision": spec.precision, "attention": spec.attention, "batch_size": spec.batch_size}
    try:
        check(spec.precision, device)
        tell("build")
        models = build(spec, device)
        off = score_difference(spec, models, device)
        assert off < ROUNDING, f"scores differ by {off:.0f} eps of their spread, over {ROUNDING}: the fold is wrong"
        fitted, outcomes = largest_batch(spec.batch_size, partial(_attempt, spec, models, device, tell))
        tell("compare what is kept")
        shared = kept_in_both(spec, models, device)
    except Unsupported as error:
        return [{"variant": name, **common, "unsupported": str(error)} for name in (UNPRUNED, ONE, ALL)]
    counted = _macs(spec, models)
    cells: list[dict[str, Any]] = []
    for name, outcome in outcomes.items():
        bound = flops.bound(counted[UNPRUNED], counted[name])
        metrics = {
            **speed(outcome.seconds, fitted),
            **against(outcomes[UNPRUNED].seconds, outcome.seconds, bound),
            "batch_size": fitted,
            "gmacs": counted[name].total / 1e9,
        }
        if name == ONE:
            metrics |= ratio("over_all_queries", outcomes[ALL].seconds, outcome.seconds)
            metrics["kept_in_both"] = shared
        cell = {"variant": name, **common, "tokens": token_trace(models[name]), "metrics": metrics}
        cells.append(cell | {"seconds": outcome.seconds, "attention_calls": outcome.kernels})
    return cells


def build(spec: ScoringSpec, device: str) -> dict[str, nn.Module]:
    """The unpruned model, and around it the two pruned ones, whose modules have the same random queries."""
    dtype = weights_dtype(spec.precision)
    prunes = {ONE: spec.prune, ALL: spec.prune}
    models = build_variants(spec.model, prunes, spec.image_size, device, dtype)
    one, every = (cast(DeployedViT, models[name]).model for name in (ONE, ALL))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for block in one.reducers:
            scorer = Scorer(one.backbone.dim, _queries(spec, models)).requires_grad_(False)
            one.reducers[block] = FoldedCropr(scorer.fold()).to(device, dtype).eval()
            every.reducers[block] = AllQueries(scorer).to(device, dtype).eval()
    return models


@torch.inference_mode()
def score_difference(spec: ScoringSpec, models: Mapping[str, nn.Module], device: str) -> float:
    """Largest difference of the scores that the first module gives the same tokens of noise in both pruned models.

    Over the scores' standard deviation, in eps of the arithmetic: a few for rounding.
    """
    backbone = cast(DeployedViT, models[ONE]).model.backbone
    dtype = weights_dtype(spec.precision)
    tokens, _ = backbone.embed(random_images(1, spec.image_size, device, dtype, channels_last=False))
    noise = torch.randn(tokens.x.shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    scores = []
    for name in (ONE, ALL):
        reducer = cast(ScoreReducer, next(iter(cast(DeployedViT, models[name]).model.reducers.values())))
        score = partial(reducer.score, tokens.replace(noise), Context())
        scores.append(under(spec.attention, spec.precision, device, score)())
    off = (scores[0] - scores[1]).abs().max() / scores[0].std()
    return float(off) / torch.finfo(arithmetic_dtype(spec.precision)).eps


@torch.inference_mode()
def kept_in_both(spec: ScoringSpec, models: Mapping[str, nn.Module], device: str) -> float:
    """Share of the kept tokens that both pruned models keep, over all their modules, for one image of noise.

    It is 1 but for rounding, which decides between tokens of almost equal score.
    """
    one, every = (cast(DeployedViT, models[name]) for name in (ONE, ALL))
    images = random_images(1, spec.image_size, device, weights_dtype(spec.precision), channels_last=False)
    kept = [under(spec.attention, spec.precision, device, partial(m.detailed, images))().kept for m in (one, every)]
    same = sum(len(set(kept[0][block][0].tolist()) & set(index[0].tolist())) for block, index in kept[1].items())
    return same / sum(index.shape[1] for index in kept[1].values())


def _attempt(
    spec: ScoringSpec, models: Mapping[str, nn.Module], device: str, tell: Tell, batch_size: int
) -> dict[str, Outcome]:
    """Time all models with batches of this size.

    Raises:
        Unsupported: the device cannot run one of them.
    """
    images = random_images(batch_size, spec.image_size, device, weights_dtype(spec.precision), channels_last=False)
    cases = [
        Case(name=name, model=model, images=images, precision=spec.precision, attention=spec.attention)
        for name, model in models.items()
    ]
    outcomes = dict(zip(models, contest(cases, spec.rounds, spec.warmup, device, tell), strict=True))
    for outcome in outcomes.values():
        if outcome.unsupported is not None:
            raise Unsupported(outcome.unsupported)
    return outcomes


def _queries(spec: ScoringSpec, models: Mapping[str, nn.Module]) -> int:
    return spec.queries or int(cast(DeployedViT, models[ONE]).model.backbone.num_patches)


def _macs(spec: ScoringSpec, models: Mapping[str, nn.Module]) -> dict[str, flops.Macs]:
    """Multiply-adds of an image; ``flops.macs`` prices every scorer as folded."""
    counted = {name: flops.macs(model) for name, model in models.items()}
    counted[ALL] = replace(counted[ALL], scoring=counted[ALL].scoring * _queries(spec, models))
    return counted
