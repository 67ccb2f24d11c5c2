"""Methods whose token count depends on the image, in evaluation (ATS) or in training (DynamicViT).

B batch, H heads, N patch tokens, K kept at most, C channels.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cropr.pruning.methods import Place
from cropr.pruning.reducers.base import Context, Reducer, Reduction, Ruled, select
from cropr.pruning.tokens import Tokens

METHODS = {  # a literal, which cropr.pruning.methods reads; "*" holds for all methods of this file
    "*": {"marker": "P", "family": "adaptive"},
    "ats": {"class": "ATS", "colour": "#ff7f0e", "options": ("place", "rule"), "place": "after_attention"},
    "dynamic_vit": {"class": "DynamicViT", "colour": "#e377c2", "options": ("ratio_weight",), "trained": True},
}


class ATS(Ruled):
    """Adaptive token sampling (Fayyaz et al., 2022): inverse transform sampling of attention times value norm.

    K fixed points of the cumulative score pick tokens; a token that several points pick is kept once. Padding, which no
    token attends to, fills the rest, so that an image does not depend on the batch.

    A point picks, by rule ``corrected``, the first token whose cumulative score reaches it; by ``reference``, that of
    the nearest cumulative score, which also picks neighbours of important tokens.
    """

    places: ClassVar[tuple[Place, ...]] = ("after_attention", "after_block")
    reads = frozenset({"cls_attention", "value_norms"})
    sets: ClassVar[frozenset[str]] = frozenset({"valid"})

    @torch.no_grad()
    def sample(self, score: Tensor, valid: Tensor | None, keep: int) -> tuple[Tensor, Tensor]:
        """Positions [B, K], ascending, of scores [B, N], and which of them are not repetitions, [B, K] bool."""
        if valid is not None:
            score = score * valid
        reached = (score / (score.sum(dim=1, keepdim=True) + 1e-6)).cumsum(dim=1)
        points = (2 * torch.arange(1, keep + 1, device=score.device) - 1) / (2 * (keep + 1))
        if self.corrected:
            picks = (reached.unsqueeze(1) < points[:, None]).sum(dim=2).clamp(max=score.shape[1] - 1)
        else:
            if valid is not None:
                reached = reached.masked_fill(~valid, torch.inf)
            picks = (reached.unsqueeze(1) - points[:, None]).abs().argmin(dim=2)
        fresh = F.pad(picks[:, 1:] != picks[:, :-1], (1, 0), value=True)
        return picks, fresh

    def forward(self, tokens: Tokens, keep: int, context: Context, want_pruned: bool) -> Reduction:
        assert context.cls_attention is not None
        assert context.value_norms is not None
        score = (context.cls_attention * context.value_norms).sum(dim=1)
        picks, fresh = self.sample(score, tokens.valid, keep)
        return Reduction(replace(tokens.keep(picks), valid=fresh))


class DynamicViT(Reducer):
    """A predictor decides which patches stay (Rao et al., 2021), trained by the main loss and a loss of the ratio.

    In training nothing is removed: dropped patches are masked from the attention of others, by straight-through
    Gumbel softmax, and the squared difference between the share that stays and K / N0 is a loss, of weight
    ``ratio_weight``. In evaluation the K patches of highest probability stay.
    """

    sets: ClassVar[frozenset[str]] = frozenset({"gate"})
    learns: ClassVar[bool] = True

    def __init__(self, dim: int, num_outputs: int, *, ratio_weight: float = 2.0) -> None:
        super().__init__(dim, num_outputs)
        if ratio_weight < 0:
            raise ValueError(f"ratio_weight={ratio_weight} must be 0 or more")
        self.ratio_weight = ratio_weight
        if dim % 2:
            raise ValueError(f"DynamicViT splits the channels into halves; the width {dim} is odd")
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        half, quarter = dim // 2, dim // 4
        layers = nn.Linear(dim, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        self.decide = nn.Sequential(*layers)

    def logits(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """[B, N, 2] float32, stay and go, of patches [B, N, C]; the mean of all is over those that ``gate`` leaves."""
        local, shared = self.embed(x).chunk(2, dim=2)
        if gate is None:
            mean = shared.mean(dim=1, keepdim=True)
        else:
            mean = (shared * gate.unsqueeze(2)).sum(dim=1, keepdim=True) / gate.sum(dim=1).clamp(min=1)[:, None, None]
        both = torch.cat((local, mean.to(local.dtype).expand_as(shared)), dim=2)
        return self.decide(both).float().log_softmax(dim=2)

    def forward(self, tokens: Tokens, keep: int, context: Context, want_pruned: bool) -> Reduction:
        logits = self.logits(tokens.patches, tokens.gate)
        if not self.training:
            return select(tokens, logits[:, :, 0], keep, want_pruned)
        gate = F.gumbel_softmax(logits, hard=True)[:, :, 0]
        if tokens.gate is not None:
            gate = gate * tokens.gate
        loss = (gate.mean(dim=1) - keep / tokens.num_patches).square().mean()
        return Reduction(replace(tokens, gate=gate), losses={"ratio": self.ratio_weight * loss})

    def macs(self, tokens: int, patches: int, keep: int, dim: int, head: int) -> int:
        half, quarter = dim // 2, dim // 4
        return patches * (dim * dim + dim * half + half * quarter + 2 * quarter)
