"""Mergers that average similar tokens: EViT, ToMe, PiToMe and ToFu.

B batch, P prefix tokens, N patch tokens, K kept, R = N - K, C channels.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cropr.pruning.methods import Place
from cropr.pruning.reducers.base import Context, Reducer, Reduction, Ruled, pool, split
from cropr.pruning.tokens import Tokens, take

METHODS = {  # a literal, which cropr.pruning.methods reads; "*" holds for all methods of this file
    "*": {"marker": "^", "family": "merger", "place": "after_attention"},
    "evit": {"class": "EViT", "colour": "#e69f00", "options": ("place", "rule")},
    "tome": {"class": "ToMe", "colour": "#8c564b", "options": ("place",)},
    "pitome": {"class": "PiToMe", "colour": "#7f7f7f", "options": ("place",)},
    "tofu": {"class": "ToFu", "colour": "#bcbd22", "options": ("place",)},
}


class EViT(Ruled):
    """Keeps the K - 1 patches that the CLS token attends to most and fuses the others into one (Liang et al., 2022).

    Rule ``reference``: the fused token is the sum of the others weighted by their attention, which is close to 0;
    ``corrected``: divided by the sum of the weights.
    """

    places: ClassVar[tuple[Place, ...]] = ("after_attention", "after_block")
    reads = frozenset({"cls_attention"})

    def forward(self, tokens: Tokens, keep: int, context: Context, want_pruned: bool) -> Reduction:
        assert context.cls_attention is not None
        score = context.cls_attention.mean(dim=1)
        kept, rest = split(score.detach(), keep - 1)
        weight = score.gather(1, rest)
        if self.corrected:
            weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-30)
        others = take(tokens.patches, rest)
        fused = weight.to(others.dtype).unsqueeze(1) @ others
        # The fused token stands where the most attended of the others stood.
        centre = torch.cat((kept, rest.gather(1, weight.argmax(dim=1, keepdim=True))), dim=1)
        ranks = torch.arange(keep - 1, device=kept.device).expand_as(kept)
        assignment = torch.full_like(score, keep - 1, dtype=torch.int64).scatter(1, kept, ranks)
        return Reduction(tokens.merge(torch.cat((take(tokens.patches, kept), fused), dim=1), centre, assignment))

    def macs(self, tokens: int, patches: int, keep: int, dim: int, head: int) -> int:
        return (patches - keep + 1) * dim


class ToMe(Reducer):
    """Merges the R most similar pairs of tokens by bipartite matching of their keys (Bolya et al., 2023).

    Tokens at even places of the sequence are sources, those at odd places targets; the order becomes sources that
    stay, then targets. Where a schedule merges more than there are sources, matching is repeated. Tokens count by their
    size in the average, in later attention and in pooling.
    """

    places: ClassVar[tuple[Place, ...]] = ("after_attention", "after_block")
    reads = frozenset({"mean_key"})
    sets: ClassVar[frozenset[str]] = frozenset({"size"})
    told: ClassVar[tuple[str, ...]] = ("depth",)

    def __init__(self, *args: Any, depth: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.depth = depth  # of the block, for the subclasses

    def forward(self, tokens: Tokens, keep: int, context: Context, want_pruned: bool) -> Reduction:
        assert context.mean_key is not None
        metric = F.normalize(context.mean_key.detach().float()[:, tokens.prefix :], dim=-1)
        while tokens.num_patches > keep:
            with torch.autocast(metric.device.type, enabled=False):
                groups = self.groups(metric, tokens.prefix, tokens.num_patches - keep)
                count = min(tokens.num_patches - keep, groups[0].shape[1])
                centre, assignment = match(metric, *groups, count)
            tokens = self.join(tokens, centre, assignment)
            metric = take(metric, centre)
        return Reduction(tokens)

    def groups(self, metric: Tensor, prefix: int, gone: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of the patches that may be merged away, of those that they go into, and of the others, [B, ...].
        ``metric`` is [B, N, d] of length 1; ``gone`` patches must go."""
        place = torch.arange(metric.shape[1], device=metric.device).expand(metric.shape[0], -1)
        first = prefix % 2
        return place[:, first::2], place[:, 1 - first :: 2], place[:, :0]

    def join(self, tokens: Tokens, centre: Tensor, assignment: Tensor) -> Tokens:
        """Average what goes into one token, weighted by size."""
        size = torch.ones_like(assignment, dtype=torch.float32) if tokens.size is None else tokens.size
        total = pool(size.unsqueeze(2), assignment, centre.shape[1])
        x = pool(tokens.patches * size.unsqueeze(2), assignment, centre.shape[1]) / total
        return tokens.merge(x.to(tokens.x.dtype), centre, assignment, total.squeeze(2))

    def macs(self, tokens: int, patches: int, keep: int, dim: int, head: int) -> int:
        total = 0
        while patches > keep:
            first = (tokens - patches) % 2
            sources = (patches - first + 1) // 2
            total += sources * (patches - sources) * head
            gone = min(patches - keep, sources)
            tokens, patches = tokens - gone, patches - gone
        return total


class PiToMe(ToMe):
    """ToMe that protects distinct tokens: only the 2 R tokens of highest energy, those with many similar tokens, are
    matched (Tran et al., 2024).

    The energy of a token is the mean over all tokens of f(cosine similarity of keys); f(s) = s above a margin that
    falls with depth, 0.9 (1 - block / depth), and exp(s - margin) - 1 below.
    """

    def groups(self, metric: Tensor, prefix: int, gone: int) -> tuple[Tensor, Tensor, Tensor]:
        similarity, margin = metric @ metric.transpose(1, 2), 0.9 * (1 - self.depth)
        energy = torch.where(similarity >= margin, similarity, torch.expm1(similarity - margin)).mean(dim=2)
        others, similar = split(-energy, max(metric.shape[1] - 2 * gone, 0))
        order = similar.gather(1, energy.gather(1, similar).topk(similar.shape[1], dim=1).indices)
        return order[:, ::2], order[:, 1::2], others

    def macs(self, tokens: int, patches: int, keep: int, dim: int, head: int) -> int:
        total = 0
        while patches > keep:
            similar = min(2 * (patches - keep), patches)
            total += (patches**2 + (similar + 1) // 2 * (similar // 2)) * head
            patches -= min(patches - keep, (similar + 1) // 2)
        return total


class ToFu(ToMe):
    """ToMe that prunes in the first half of the network and merges in the second (Kim et al., 2024).

    In the first half a target keeps its value and takes over the size. In the second the average keeps its direction
    and gets the largest norm of its members (MLERP). The split at half the depth is our reading.
    """

    def join(self, tokens: Tokens, centre: Tensor, assignment: Tensor) -> Tokens:
        joined = super().join(tokens, centre, assignment)
        if self.depth > 0.5:
            norms = tokens.patches.float().norm(dim=2)
            largest = norms.new_zeros(centre.shape).scatter_reduce(1, assignment, norms, "amax")
            x = F.normalize(joined.patches, dim=2) * largest.unsqueeze(2)
        else:
            x = take(tokens.patches, centre)
        return joined.replace(torch.cat((tokens.x[:, : tokens.prefix], x.to(tokens.x.dtype)), dim=1))


def match(metric: Tensor, source: Tensor, target: Tensor, others: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: the ``count`` sources that are closest to a target go into it.

    ``metric`` is [B, N, d] of length 1; ``source``, ``target`` and ``others`` are positions, each once. Returns the
    positions [B, N - count] of tokens that stay (others, sources, targets), and which of them each goes into, [B, N].
    """
    closest = (take(metric, source) @ take(metric, target).transpose(1, 2)).max(dim=2)
    stay, gone = split(-closest.values, source.shape[1] - count)
    centre = torch.cat((others, source.gather(1, stay), target), dim=1)
    rank = torch.arange(centre.shape[1], device=centre.device).expand_as(centre)
    assignment = centre.new_zeros(metric.shape[:2]).scatter(1, centre, rank)
    into = closest.indices.gather(1, gone) + (centre.shape[1] - target.shape[1])
    return centre, assignment.scatter(1, source.gather(1, gone), into)
