"""Multiply-accumulates of a ViT as a function of its token counts.

One block on N tokens costs 4 N C^2 + 2 N^2 C in attention (projections; q k^T and its product with v) and the weights
of its MLP once a token, 8 N C^2 at ratio 4. Pruning changes N from block to block, so one function of N prices every
schedule. Counted are the matrix products of the inference graph, as torch's own counter does. Norms, activations,
softmax, rotary embeddings, top-k and copies are left out, and so is everything that only training runs (aggregators,
auxiliary heads). One MAC is two FLOPs; a GMAC is 10^9 MACs.

The ratio of two totals is the bound on the speed-up: what pruning would give if time were proportional to MACs.

N tokens with prefix, C channels, H heads, d channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cropr.pruning.model import DeployedViT, PrunedViT
from cropr.pruning.schedule import attended, trace
from cropr.pruning.scorer import FoldedScorer, Scorer

_ATTENTION = {"Attention", "AttentionRope", "EvaAttention"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDims:
    """What a block multiplies with."""

    attention_weights: int
    """Weights of the q, k, v and output projections (and a gate's); every token passes each once."""
    attention_width: int
    """H d, channels of q and of v over all heads."""
    mlp_weights: int
    """Weights of the block's other linear layers; every token passes each once."""

    @classmethod
    def standard(cls, dim: int, mlp_ratio: float = 4.0) -> BlockDims:
        """The block of the original ViT: C channels in attention, an MLP of two layers."""
        hidden = int(dim * mlp_ratio)
        return cls(attention_weights=4 * dim * dim, attention_width=dim, mlp_weights=2 * dim * hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class Macs:
    """Multiply-accumulates for one image."""

    blocks: tuple[int, ...]
    products: int
    """Part of the blocks: the two products of attention, which have no weights."""
    patch_embed: int
    head: int
    scoring: int = 0
    """All reducers together."""
    fusion: int = 0
    """What a fusion multiplies besides what it gives the last block and the head to do."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self.blocks) + self.patch_embed + self.head + self.scoring + self.fusion

    @property
    def linear(self) -> int:
        """Patch embedding and linear layers of the blocks alone: what a counter finds that cannot see fused attention.
        The published numbers of the detector are of this kind."""
        return sum(self.blocks) - self.products + self.patch_embed


def block_macs(tokens: int, dims: BlockDims, keys: int | None = None) -> int:
    """One block on ``tokens`` tokens, prefix included: 4 N C^2 + 2 N^2 C + MLP(N).

    ``keys``: how many tokens each attends to, as ``Backbone.keys`` says; all of them unless given.
    """
    linear = tokens * (dims.attention_weights + dims.mlp_weights)
    return linear + attention_products(tokens, dims, tokens if keys is None else keys)


def attention_products(tokens: int, dims: BlockDims, keys: int) -> int:
    """Of one block: q k^T, and its product with v."""
    return 2 * tokens * keys * dims.attention_width


def blocks_macs(tokens: Sequence[int], dims: BlockDims) -> tuple[int, ...]:
    """Equal blocks; ``tokens`` as ``cropr.pruning.schedule.attended`` gives them."""
    return tuple(block_macs(count, dims) for count in tokens)


def scorer_macs(tokens: int, dim: int) -> int:
    """A folded Cropr scorer: one dot product a token, whatever the number of queries and heads."""
    return tokens * dim


def bound(base: Macs, pruned: Macs) -> float:
    """Speed-up that pruning would give if time were proportional to MACs: base over pruned."""
    return base.total / pruned.total


def macs(model: nn.Module, image_size: int | None = None) -> Macs:
    """Price one image of a timm host, a ``PrunedViT`` or a ``DeployedViT``.

    Args:
        model: dimensions are read from its modules; the meta device will do.
        image_size: pixels a side of a host with ``dynamic_img_size``; None for the size that the model was built for.

    Raises:
        ValueError: a part that is not priced here, by name, or another image size than the model was built for.
    """
    if isinstance(model, DeployedViT):
        model = model.model
    pruned = model if isinstance(model, PrunedViT) else None
    host: Any = model if pruned is None else pruned.backbone.host
    patches, prefix = num_patches(host, image_size), host.num_prefix_tokens
    counts = (patches,) * len(host.blocks) if pruned is None else pruned.counts(patches)
    tokens = attended(counts, patches, pruned is not None and pruned.fuses_early, prefix)
    left = trace(counts, patches, prefix)[1:]
    dims = [block_dims(block) for block in host.blocks]
    keys = list(tokens)
    scoring, fusion, predicted = 0, 0, 1
    if pruned is not None:
        keys = [pruned.backbone.keys(block, count) for block, count in enumerate(tokens, start=1)]
        fusion, predicted = _fusion_macs(pruned, counts, patches)
        at = [block for block in map(int, pruned.reducers) if left[block - 1] < tokens[block - 1]]
        scoring = sum(_scoring_macs(pruned, block, tokens[block - 1]) for block in at)
    blocks = list(zip(tokens, dims, keys, strict=True))
    return Macs(
        blocks=tuple(block_macs(*block) for block in blocks),
        products=sum(attention_products(*block) for block in blocks),
        patch_embed=patches * host.patch_embed.proj.weight.numel(),
        head=predicted * _head_macs(host),
        scoring=scoring,
        fusion=fusion,
    )


def block_dims(block: nn.Module) -> BlockDims:
    """Dimensions of a timm block, read from its layers.

    Raises:
        ValueError: an attention or a layer whose arithmetic is not known here.
    """
    # timm's ParallelScalingBlock holds its attention's projections itself, fused with those of the MLP.
    fused = type(block).__name__ == "ParallelScalingBlock"
    attentions: list[Any] = [m for m in block.modules() if type(m).__name__ in _ATTENTION] or [block] * fused
    others = [type(m).__name__ for m in block.modules() if not isinstance(m, nn.Linear) and _has_matrix(m)]
    if not attentions or others:
        parts = others or [type(m).__name__ for m in block.children()]
        raise ValueError(
            f"cannot count the FLOPs of {type(block).__name__} with {parts}; known are linear layers and attention "
            f"of type {sorted(_ATTENTION)}"
        )
    weights = 0 if fused else sum(_linear_weights(attention) for attention in attentions)
    return BlockDims(
        attention_weights=weights,
        attention_width=sum(attention.num_heads * attention.head_dim for attention in attentions),
        mlp_weights=_linear_weights(block) - weights,
    )


def _fusion_macs(model: PrunedViT, counts: Sequence[int], patches: int) -> tuple[int, int]:
    """Of the fusion itself, and how many tokens the head sees."""
    prefix = model.backbone.prefix
    survivors = (counts[-2] if len(counts) > 1 else patches) + prefix
    cost = 0
    if model.fusion is not None:
        before = [patches, *counts[:-1]]
        away = {block: before[block - 1] - before[block] for block in range(1, len(counts))}
        cost = model.fusion.macs(survivors, {block: gone for block, gone in away.items() if gone})
    if not model.dense:
        return cost, 1
    return cost, survivors if model.fusion is None or model.fusion.place == "after_head" else patches + prefix


def num_patches(host: Any, image_size: int | None = None) -> int:
    """Patch tokens of an image of ``image_size`` pixels a side.

    Raises:
        ValueError: the host was built for another size.
    """
    built = host.patch_embed.img_size[0]
    size = built if image_size is None else image_size
    if size != built and not host.dynamic_img_size:
        raise ValueError(f"the model was built for {built} px, not {size}; build it with img_size={size}")
    rows, columns = host.patch_embed.dynamic_feat_size((size, size))
    return rows * columns


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))


def _linear_weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _head_macs(host: Any) -> int:
    """Linear classifiers on the pooled token: one, or two with a distillation token."""
    if getattr(host, "attn_pool", None) is not None:
        raise ValueError(f"cannot count the FLOPs of {type(host.attn_pool).__name__}; use avg or token pooling")
    layers = (host.head, getattr(host, "head_dist", None))
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))


def _scoring_macs(model: PrunedViT, block: int, tokens: int) -> int:
    """What the reducer after ``block`` multiplies to score the ``tokens`` (with prefix) that the block leaves."""
    reducer: Any = model.reducers[str(block)]
    if any(isinstance(part, Scorer | FoldedScorer) for part in reducer.modules()):
        return scorer_macs(tokens, model.backbone.dim)
    return model.backbone.cls_attention_macs(block, tokens) if reducer.wants_attention else 0
