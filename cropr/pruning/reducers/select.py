"""Pruners: every patch token gets a score, and the tokens of lowest score are pruned.

Sources: paper, section 3 and Table 1; rules of the competitors as they could be established are in docs/reducers.md.
"""

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cropr.pruning.methods import Place
from cropr.pruning.reducers.base import Context, Reducer, Reduction, ScoreReducer, select
from cropr.pruning.scorer import Aggregator, AuxiliaryHead, FoldedScorer, Scorer
from cropr.pruning.tokens import Tokens

METHODS = {  # a literal, which cropr.pruning.methods reads; "*" holds for all methods of this file
    "*": {"marker": "o"},
    "cropr": {
        "class": "Cropr",
        "colour": "#d55e00",
        "options": ("num_queries", "num_heads", "qkv_proj", "norm", "mlp", "mlp_ratio", "selector", "stop_gradient"),
        # All but the norm, which scales every token.
        "training_only": ("num_queries", "num_heads", "qkv_proj", "mlp", "mlp_ratio", "selector", "stop_gradient"),
    },
    "non_salient": {"like": "cropr", "class": "NonSalient", "label": "Non-salient", "colour": "#56b4e9"},
    "random": {"class": "Random", "colour": "#0072b2"},
    "variance": {"class": "Variance", "colour": "#009e73"},
    "attn_topk": {"class": "AttentionTopK", "label": "Attn Top-K", "colour": "#cc79a7", "options": ("place",)},
}


class FoldedCropr(ScoreReducer):
    """Cropr at inference: one vector for scoring."""

    def __init__(self, scorer: FoldedScorer) -> None:
        super().__init__()
        self.scorer = scorer

    def score(self, tokens: Tokens, context: Context) -> Tensor:
        # The prefix is scored, too, and cut off: leaving it out first would copy all tokens.
        return self.scorer(tokens.x)[:, tokens.prefix :]

    def macs(self, tokens: int, patches: int, keep: int, dim: int, head: int) -> int:
        return tokens * dim


class Cropr(Reducer):
    """Scores by cross-attention with learned queries that an auxiliary task trains (paper, section 3).

    Args:
        dim, num_outputs: channels of the tokens; outputs of the auxiliary head, usually the classes.
        num_queries, num_heads, qkv_proj, norm, mlp, mlp_ratio: as of ``Scorer`` and ``Aggregator``.
        selector: ``topk``, or ``sample``: in training, K tokens drawn without replacement in proportion to the
            aggregator's softmax (Gumbel top-k); evaluation is Top-K for both.
        stop_gradient: auxiliary losses do not reach the encoder.
    """

    sign: ClassVar[int] = 1
    leaves_pruned: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    training_only: ClassVar[tuple[str, ...]] = ("scorer", "aggregator", "head")

    def __init__(
        self,
        dim: int,
        num_outputs: int,
        *,
        num_queries: int = 1,
        num_heads: int = 1,
        qkv_proj: bool = False,
        norm: bool = False,
        mlp: bool = True,
        mlp_ratio: float = 4.0,
        selector: Literal["topk", "sample"] = "topk",
        stop_gradient: bool = True,
    ) -> None:
        super().__init__()
        if selector not in ("topk", "sample"):
            raise ValueError(f"unknown selector {selector!r}; choose 'topk' or 'sample'")
        self.selector, self.stop_gradient = selector, stop_gradient
        self.scorer = Scorer(dim, num_queries, num_heads, qkv_proj, norm)
        self.aggregator = Aggregator(dim, num_heads, qkv_proj, mlp, mlp_ratio)
        self.head = AuxiliaryHead(dim, num_outputs)

    def forward(self, tokens: Tokens, keep: int, context: Context, want_pruned: bool) -> Reduction:
        # The deployed form scores in every mode, in float32 under any autocast, so that training, evaluation and
        # deployment keep the same tokens. No gradient passes a Top-K.
        with torch.no_grad(), torch.autocast(tokens.x.device.type, enabled=False):
            score = self.deploy().score(tokens, context)
        if not self.training:
            return select(tokens, score, keep, want_pruned)
        if self.selector == "sample":
            score = score / math.sqrt(tokens.x.shape[-1]) - torch.empty_like(score).exponential_().log()
        x = tokens.x.detach() if self.stop_gradient else tokens.x
        logits, x = self.scorer(x)
        return replace(select(tokens, score, keep, want_pruned), aux=self.head(self.aggregator(logits, x)))

    def macs(self, tokens: int, patches: int, keep: int, dim: int, head: int) -> int:
        return tokens * dim

    @torch.no_grad()
    def deploy(self) -> FoldedCropr:
        scorer = self.scorer.fold()
        return FoldedCropr(FoldedScorer((self.sign * scorer.weight).clone(), scorer.eps))


class NonSalient(Cropr):
    """Cropr with its selector inverted: prunes the tokens of *highest* score. The sanity check of Table 1."""

    sign: ClassVar[int] = -1


class Random(ScoreReducer):
    """Uniform scores, fresh for every image, block and call, from torch's global generator."""

    def score(self, tokens: Tokens, context: Context) -> Tensor:
        return torch.rand(tokens.patches.shape[:2], device=tokens.x.device)


class Variance(ScoreReducer):
    """Variance of the patch's input pixels over its area and channels; static over the blocks. Our reading of the
    paper's "Variance [43]" row: no public code defines it (docs/reducers.md)."""

    reads = frozenset({"pixels"})

    def score(self, tokens: Tokens, context: Context) -> Tensor:
        assert context.pixels is not None
        assert tokens.index is not None
        return context.pixels.gather(1, tokens.index)


class AttentionTopK(ScoreReducer):
    """Attention of the CLS query in the block just run, averaged over heads; wants CLS pooling."""

    places: ClassVar[tuple[Place, ...]] = ("after_block", "after_attention")
    reads = frozenset({"cls_attention"})

    def score(self, tokens: Tokens, context: Context) -> Tensor:
        assert context.cls_attention is not None
        return context.cls_attention.detach().mean(dim=1)
