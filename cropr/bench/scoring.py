"""What it saves to score tokens with one vector: the deployed model against one that scores all queries, then sums.

A segmenter has a query for every patch. The authors' released inference path computes the logits of all of them, Q N C
multiply-adds a module, before it sums over queries; the paper folds the queries into one vector first, N C. Both models
here share the host and the queries, and take turns with the unpruned model in one process.

B batch, L tokens with prefix, C channels, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from cropr.bench.attention import with_attention_kernel
from cropr.bench.device import Unsupported, arithmetic_dtype, check, largest_batch, weights_dtype
from cropr.bench.models import UNPRUNED, build_variants, random_images, token_trace
from cropr.bench.specs import ScoringSpec
from cropr.bench.timing import Case, Outcome, Tell, against, ratio, speed, time_interleaved
from cropr.pruning import flops
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
    """Logits of every query on every token, summed: what ``FoldedCropr`` makes unnecessary. Not for deployment."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def score(self, tokens: Tokens, context: Context) -> Tensor:
        logits, _ = self.scorer(tokens.x)
        return logits.sum(dim=(1, 2), dtype=torch.float32)[:, tokens.prefix :]


def scoring_cells(spec: ScoringSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """Time the unpruned model and both pruned ones; arguments and errors as of ``cropr.bench.microbench.measure``.

    Returns:
        One a model: ``variant``, ``precision``, ``attention``, ``batch_size``, ``tokens``, and
        either ``unsupported`` with the reason, or ``seconds`` (round by round), ``attention_calls`` and ``metrics``:
        ``speedup`` over the unpruned model beside its ``mac_ratio``, and of the one vector
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
    macs = {name: flops.macs(model).total for name, model in models.items()}
    cells: list[dict[str, Any]] = []
    for name, outcome in outcomes.items():
        metrics = {
            **speed(outcome.seconds, fitted),
            **against(outcomes[UNPRUNED].seconds, outcome.seconds, macs[UNPRUNED] / macs[name]),
            "batch_size": fitted,
            "gmacs": macs[name] / 1e9,
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
            scorer = Scorer(one.backbone.dim, spec.queries or one.backbone.num_patches).requires_grad_(False)
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
        scores.append(with_attention_kernel(spec.attention, spec.precision, device, score)())
    off = (scores[0] - scores[1]).abs().max() / scores[0].std()
    return float(off) / torch.finfo(arithmetic_dtype(spec.precision)).eps


@torch.inference_mode()
def kept_in_both(spec: ScoringSpec, models: Mapping[str, nn.Module], device: str) -> float:
    """Share of the kept tokens that both pruned models keep, over all their modules, for one image of noise.

    It is 1 but for rounding, which decides between tokens of almost equal score.
    """
    one, every = (cast(DeployedViT, models[name]) for name in (ONE, ALL))
    images = random_images(1, spec.image_size, device, weights_dtype(spec.precision), channels_last=False)
    kept = [
        with_attention_kernel(spec.attention, spec.precision, device, partial(m.detailed, images))().kept
        for m in (one, every)
    ]
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
    outcomes = dict(zip(models, time_interleaved(cases, spec.rounds, spec.warmup, device, tell), strict=True))
    for outcome in outcomes.values():
        if outcome.unsupported is not None:
            raise Unsupported(outcome.unsupported)
    return outcomes
