"""Methods that rewrite all patch tokens as K mixtures: SiT, Sinkhorn and PatchMerger. All are trained by the main loss.

B batch, N patch tokens, K slots, C channels.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cropr.pruning.reducers.base import Context, Reducer, Reduction, Ruled
from cropr.pruning.tokens import Tokens

METHODS = {  # a literal, which cropr.pruning.methods reads; "*" holds for all methods of this file
    "*": {"marker": "D", "family": "slots", "trained": True},
    "sit": {"class": "SiT", "colour": "#1f77b4"},
    "sinkhorn": {"class": "Sinkhorn", "colour": "#2ca02c", "options": ("epsilon", "iterations")},
    "patch_merger": {"class": "PatchMerger", "colour": "#d62728", "options": ("rule",)},
}


class Slots(Reducer):
    """Base class: K outputs without a place. A ramp of the rate has no effect on them, since K is a shape."""

    slots: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    told: ClassVar[tuple[str, ...]] = ("keep",)

    def __init__(self, dim: int, num_outputs: int, *, keep: int) -> None:
        super().__init__(dim, num_outputs)
        self.keep = keep

    def mix(self, x: Tensor) -> Tensor:
        """Slots [B, K, C] of patches [B, N, C]."""
        raise NotImplementedError

    def forward(self, tokens: Tokens, keep: int, context: Context, want_pruned: bool) -> Reduction:
        if keep != self.keep:
            made = f"{type(self).__name__} was made for {self.keep} tokens and is asked for {keep}"
            raise ValueError(f"{made}: use images of the size that the model was built for")
        x = torch.cat((tokens.x[:, : tokens.prefix], self.mix(tokens.patches).to(tokens.x.dtype)), dim=1)
        return Reduction(Tokens(x, None, tokens.prefix))

    def macs(self, tokens: int, patches: int, keep: int, dim: int, head: int) -> int:
        return 2 * patches * keep * dim


class SiT(Slots):
    """Token slimming (Zong et al., 2022): a softmax over the tokens of a small MLP mixes the tokens."""

    def __init__(self, dim: int, num_outputs: int, *, keep: int) -> None:
        super().__init__(dim, num_outputs, keep=keep)
        self.logits = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, keep))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def mix(self, x: Tensor) -> Tensor:
        return (self.logits(x) * self.scale).softmax(dim=1).transpose(1, 2) @ x

    def macs(self, tokens: int, patches: int, keep: int, dim: int, head: int) -> int:
        return patches * (dim * (dim // 2) + dim // 2 * keep + keep * dim)


class Sinkhorn(Slots):
    """Optimal transport to learned prototypes (Haurum et al., 2022): unit tokens, summed by the transport plan.

    Both marginals ask for 1 / (K + N), which cannot hold together; columns sum to 1, rows to N / K. A small entropy
    ``epsilon`` makes assignments hard; ``iterations`` are scalings of rows and columns.
    """

    def __init__(self, dim: int, num_outputs: int, *, keep: int, epsilon: float = 1.0, iterations: int = 3) -> None:
        super().__init__(dim, num_outputs, keep=keep)
        if epsilon <= 0 or iterations < 1:
            raise ValueError(f"epsilon={epsilon} must be above 0, iterations={iterations} must be 1 or more")
        self.epsilon, self.iterations = epsilon, iterations
        self.prototypes = nn.Parameter(torch.randn(keep, dim))

    def plan(self, x: Tensor) -> Tensor:
        """Transport plan [B, K, N] of unit tokens x [B, N, C]."""
        similarity = (F.normalize(self.prototypes.float(), dim=1) @ x.transpose(1, 2)) / self.epsilon
        rows = columns = similarity.new_zeros(1)
        # With marginals of 1 instead of 1 / (K + N) the plan needs no factor K + N at the end.
        for _ in range(self.iterations):
            rows = -(similarity + columns).logsumexp(dim=2, keepdim=True)
            columns = -(similarity + rows).logsumexp(dim=1, keepdim=True)
        return (similarity + rows + columns).exp()

    def mix(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(x.float(), dim=2)
            return self.plan(x) @ x


class PatchMerger(Ruled, Slots):
    """Learned queries attend to the normalised tokens (Renggli et al., 2022).

    Rule ``reference``: logits without a scale, which makes the softmax almost one-hot for wide models; ``corrected``:
    divided by the root of C.
    """

    def __init__(self, dim: int, num_outputs: int, **kwargs: Any) -> None:
        super().__init__(dim, num_outputs, **kwargs)
        self.scale = dim**-0.5 if self.corrected else 1.0
        self.norm = nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(self.keep, dim))

    def mix(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return (self.queries @ x.transpose(1, 2) * self.scale).softmax(dim=2) @ x
