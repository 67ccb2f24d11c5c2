"""Time saved by scoring tokens with one vector: the deployed model against one that scores all queries, then sums.

A segmenter has a query for every patch. The authors' released inference path computes the logits of all of them, Q N C
multiply-adds a module, before it sums over queries; the paper folds the queries into one vector first, N C. Both models
here share the host and the queries, and take turns with the unpruned model in one process.

B batch, L tokens with prefix, C channels, Q queries.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cropr.bench.device import Unsupported, noise, weights_dtype, with_attention_kernel
from cropr.bench.models import build_variants, token_trace
from cropr.bench.specs import UNPRUNED
from cropr.bench.timing import Case, Tell, against, ratio, speed, time_interleaved
from cropr.pruning import flops
from cropr.pruning.reducers import Context, ScoreReducer
from cropr.pruning.reducers.select import FoldedCropr
from cropr.pruning.scorer import Scorer
from cropr.pruning.tokens import Tokens
from workflow.paper.microbench import ScoringSpec

ONE, ALL = "one_vector", "all_queries"
"""The two pruned models."""


class AllQueries(ScoreReducer):
    """Logits of every query on every token, summed: what ``FoldedCropr`` makes unnecessary. Not for deployment."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def score(self, tokens: Tokens, context: Context) -> Tensor:
        logits, _ = self.scorer(tokens.x)
        return logits.sum(dim=(1, 2), dtype=torch.float32)[:, tokens.prefix :]


def scoring_cells(spec: ScoringSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """Time the unpruned model and both pruned ones; arguments and errors as of ``microbench.measure.measure``.

    Returns:
        One a model: ``tokens``, ``seconds`` (round by round), ``attention_calls`` and ``metrics``: ``speedup`` over the
        unpruned model beside its ``mac_ratio``, and of the one vector ``over_all_queries``, how many times faster it is
        than all queries, with its interval, and ``kept_in_both``, the share of the kept tokens that both keep.
    """
    tell("build")
    models = build(spec, device)
    how: dict[str, Any] = {"precision": spec.precision, "attention": spec.attention}
    shape = (3, spec.image_size, spec.image_size)
    cases = [Case(name=name, model=model, shape=shape, **how) for name, model in models.items()]
    fitted, timed = time_interleaved(cases, spec.batch_size, spec.rounds, spec.warmup, device, tell)
    for outcome in timed:
        if outcome.unsupported is not None:
            raise Unsupported(outcome.unsupported)
    outcomes = dict(zip(models, timed, strict=True))
    macs = {name: flops.macs(model).total for name, model in models.items()}
    cells: list[dict[str, Any]] = []
    for name, outcome in outcomes.items():
        metrics = speed(outcome.seconds, fitted) | {"batch_size": fitted, "gmacs": macs[name] / 1e9}
        metrics |= against(outcomes[UNPRUNED].seconds, outcome.seconds, macs[UNPRUNED] / macs[name])
        if name == ONE:
            metrics |= ratio("over_all_queries", outcomes[ALL].seconds, outcome.seconds)
            metrics["kept_in_both"] = _kept_in_both(spec, models, device)
        cell = {"tokens": token_trace(models[name]), "metrics": metrics, "seconds": outcome.seconds}
        cells.append(cell | {"attention_calls": outcome.kernels})
    return cells


def build(spec: ScoringSpec, device: str) -> dict[str, Any]:
    """The unpruned model, and around it the two pruned ones, whose modules have the same random queries."""
    dtype = weights_dtype(spec.precision)
    models: dict[str, Any] = build_variants(
        spec.model, {ONE: spec.prune, ALL: spec.prune}, spec.image_size, device, dtype
    )
    one, every = models[ONE].model, models[ALL].model
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for block in one.reducers:
            scorer = Scorer(one.backbone.dim, spec.queries or one.backbone.num_patches).requires_grad_(False)
            one.reducers[block] = FoldedCropr(scorer.fold()).to(device, dtype).eval()
            every.reducers[block] = AllQueries(scorer).to(device, dtype).eval()
    return models


@torch.inference_mode()
def _kept_in_both(spec: ScoringSpec, models: dict[str, Any], device: str) -> float:
    """Share of the kept tokens that both pruned models keep, over all their modules, for one image of noise: 1 but for
    rounding, which decides between tokens of almost equal score."""
    images = noise(1, (3, spec.image_size, spec.image_size), device, spec.precision)
    one, every = (
        with_attention_kernel(spec.attention, spec.precision, device, partial(models[name].detailed, images))().kept
        for name in (ONE, ALL)
    )
    same = sum(len(set(one[block][0].tolist()) & set(index[0].tolist())) for block, index in every.items())
    return same / sum(index.shape[1] for index in every.values())
