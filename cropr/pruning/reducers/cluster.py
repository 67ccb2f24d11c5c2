"""Methods that cluster the patch tokens: K-Medoids (Token Pooling) and DPC-KNN.

B batch, N patch tokens, K clusters, C channels.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cropr.pruning.methods import Place
from cropr.pruning.reducers.base import Context, Reduction, Ruled, pool
from cropr.pruning.tokens import Tokens, take

METHODS = {  # a literal, which cropr.pruning.methods reads; "*" holds for all methods of this file
    "*": {"marker": "v", "family": "merger"},
    "k_medoids": {
        "class": "KMedoids",
        "label": "K-Medoids",
        "colour": "#9467bd",
        "options": ("place", "rule", "weights", "iterations"),
    },
    "dpc_knn": {
        "class": "DpcKnn",
        "label": "DPC-KNN",
        "colour": "#17becf",
        "options": ("place", "rule", "weights", "neighbours"),
        "trained": True,
    },
}


class KMedoids(Ruled):
    """Clusters the patches around K of them, which stay unchanged (Marin et al., 2023, weighted K-Medoids).

    The first medoids are the K patches of largest weight, or with equal weights those at even steps of the sequence;
    assignment and update alternate.

    Args:
        rule: how a medoid is updated. ``corrected``: the member with the least weighted distance to the members of its
            cluster. ``reference``: that with the least distance to all patches times its own weight.
        weights: ``attention``: what each patch receives from all queries; ``cls``: from the CLS query; ``equal``.
        iterations: updates.
    """

    places: ClassVar[tuple[Place, ...]] = ("after_block", "after_attention")

    def __init__(self, *args: Any, weights: str = "attention", iterations: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fields = {"attention": {"column_sums"}, "cls": {"cls_attention"}, "equal": set()}
        if weights not in fields:
            raise ValueError(f"weights={weights!r}; choose one of {', '.join(fields)}")
        if iterations < 0:
            raise ValueError(f"iterations={iterations} must be 0 or more")
        self.iterations, self.reads = iterations, frozenset(fields[weights])

    @torch.no_grad()
    def clusters(self, x: Tensor, weight: Tensor | None, keep: int) -> tuple[Tensor, Tensor]:
        """Medoids [B, K] and clusters [B, N] of x [B, N, C] with weights [B, N], or None for equal ones."""
        distance = distances(x)
        place = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        if weight is None:
            medoids = ((2 * place[:, :keep] + 1) * x.shape[1]).div(2 * keep, rounding_mode="floor")
            weight = torch.ones_like(distance[:, 0])
        else:
            medoids = weight.topk(keep, dim=1).indices
        assignment = take(distance, medoids).argmin(dim=1)
        for _ in range(self.iterations):
            if self.corrected:
                same = assignment.unsqueeze(2) == assignment.unsqueeze(1)
                cost = (same * distance * weight.unsqueeze(1)).sum(dim=2)
            else:
                cost = weight * distance.sum(dim=2)
            least = cost.new_full(medoids.shape, torch.inf).scatter_reduce(1, assignment, cost, "amin")
            best = torch.where(cost == least.gather(1, assignment), place, x.shape[1])
            found = medoids.new_full(medoids.shape, x.shape[1]).scatter_reduce(1, assignment, best, "amin")
            medoids = torch.where(found < x.shape[1], found, medoids)  # an empty cluster keeps its medoid
            assignment = take(distance, medoids).argmin(dim=1)
        return medoids, assignment

    def forward(self, tokens: Tokens, keep: int, context: Context, want_pruned: bool) -> Reduction:
        row = context.cls_attention
        weight = context.column_sums if row is None else row.mean(dim=1)
        medoids, assignment = self.clusters(tokens.patches, weight, keep)
        return Reduction(tokens.merge(take(tokens.patches, medoids), medoids, assignment))

    def macs(self, tokens: int, patches: int, keep: int, dim: int, head: int) -> int:
        return patches**2 * dim


class DpcKnn(Ruled):
    """Clusters the patches by density peaks and averages each cluster (Du et al., 2016; as in TCFormer).

    A centre has many patches nearby and is far from every denser patch.

    Args:
        rule: ``reference``: density times distance, where exp underflows for tokens of large norm, so that a constant
            pattern of 1e-6 decides; ``corrected``: the logarithm of it.
        weights: of the members of a cluster: ``learned``, exp of a linear layer, trained by the main loss; ``equal``.
        neighbours: k, of which the density is the mean; the patch is one of them.
    """

    places: ClassVar[tuple[Place, ...]] = ("after_block", "after_attention")

    def __init__(self, dim: int, *args: Any, weights: str = "learned", neighbours: int = 5, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        if weights not in ("learned", "equal"):
            raise ValueError(f"weights={weights!r}; choose 'learned' or 'equal'")
        if neighbours < 1:
            raise ValueError(f"neighbours={neighbours} must be 1 or more")
        self.neighbours = neighbours
        self.weight = nn.Linear(dim, 1) if weights == "learned" else None
        if self.weight is not None:
            nn.init.trunc_normal_(self.weight.weight, std=0.02)
            nn.init.zeros_(self.weight.bias)

    @torch.no_grad()
    def clusters(self, x: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Centres [B, K] and clusters [B, N] of x [B, N, C]."""
        distance = distances(x) * x.shape[2] ** -0.5
        place = torch.arange(x.shape[1], device=x.device)
        near = distance.topk(min(self.neighbours, x.shape[1]), dim=2, largest=False, sorted=False).values
        density = -near.square().mean(dim=2)
        if not self.corrected:
            density = density.exp() + 1e-6 * (place * 0.618034).frac()
        denser = density.unsqueeze(1) > density.unsqueeze(2)
        apart = distance.masked_fill(~denser, torch.inf).amin(dim=2)
        apart = torch.where(apart.isinf(), distance.amax(dim=(1, 2)).unsqueeze(1), apart)
        score = apart.clamp(min=1e-30).log() + density if self.corrected else apart * density
        centres = score.topk(keep, dim=1).indices
        assignment = take(distance, centres).argmin(dim=1)
        rank = place[:keep].expand_as(centres)
        return centres, assignment.scatter(1, centres, rank)

    def forward(self, tokens: Tokens, keep: int, context: Context, want_pruned: bool) -> Reduction:
        patches = tokens.patches
        centres, assignment = self.clusters(patches, keep)
        with torch.autocast(patches.device.type, enabled=False):
            x = patches.float()
            weight = x.new_ones(*x.shape[:2], 1)
            if self.weight is not None:
                logit = F.linear(x, self.weight.weight.float(), self.weight.bias.float())
                if self.corrected:  # a factor for each cluster changes no average and keeps exp in range
                    least = logit.new_full((x.shape[0], keep), -torch.inf)
                    top = least.scatter_reduce(1, assignment, logit.detach().squeeze(2), "amax")
                    logit = logit - top.gather(1, assignment).unsqueeze(2)
                weight = logit.exp()
            total = pool(weight, assignment, keep)
            merged = pool(x * weight, assignment, keep) / (total if self.corrected else total + 1e-6)
        return Reduction(tokens.merge(merged.to(patches.dtype), centres, assignment))

    def macs(self, tokens: int, patches: int, keep: int, dim: int, head: int) -> int:
        return patches**2 * dim + (0 if self.weight is None else patches * dim)


def distances(x: Tensor) -> Tensor:
    """Euclidean distances [B, N, N] in float32 of x [B, N, C], whatever its precision."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        x = x - x.mean(dim=1, keepdim=True)  # large common parts would cancel digits
        square = x.square().sum(dim=2)
        found = square.unsqueeze(1) + square.unsqueeze(2) - 2 * (x @ x.transpose(1, 2))
        return found.clamp(min=0).sqrt().masked_fill(torch.eye(x.shape[1], dtype=torch.bool, device=x.device), 0)
