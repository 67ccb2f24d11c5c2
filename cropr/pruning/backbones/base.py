"""What the pruned model asks of a host, and which adapter fits a host.

An adapter's file declares the classes that it adapts as a literal, so that only the file that is needed is imported:
``ADAPTERS = {"timm.models.vision_transformer.VisionTransformer": "ViTBackbone"}``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cropr.pruning.methods import declared
from cropr.pruning.tokens import Tokens


class Backbone(nn.Module):
    """Adapter to a timm model: runs the host's own blocks through its documented surface, copies none of its code.

    Args:
        host: the timm model; kept as it is, its parameters keep their names below ``host``.

    Raises:
        TypeError: a feature of the host that pruning would silently break, by name.
    """

    host_type: ClassVar[type[nn.Module]]
    """Class of the host; a subclass must not have a ``forward_features`` of its own, which we would skip."""
    block_types: ClassVar[tuple[type[nn.Module], ...]]
    """Classes of blocks that can be run one by one."""
    halved_types: ClassVar[tuple[type[nn.Module], ...]]
    """Those of them that ``attend`` and ``mlp`` can run by halves: a norm before each."""
    attention_type: ClassVar[type[nn.Module]]
    """Class of a block's ``attn`` whose projections can be read."""
    host: Any

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self._verify()

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.host.blocks)

    @property
    def dim(self) -> int:
        """C, channels of the tokens."""
        return self.host.embed_dim

    @property
    def prefix(self) -> int:
        """P, prefix tokens: CLS, distillation, registers."""
        return self.host.num_prefix_tokens

    @property
    def num_patches(self) -> int:
        """Patch tokens of an image of the size that the host was built for."""
        return self.host.patch_embed.num_patches

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the patch grid of images [B, 3, H, W]."""
        rows, columns = self.host.patch_embed.patch_size
        return images.shape[-2] // rows, images.shape[-1] // columns

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        """Images [B, 3, H, W] to all tokens before block 1, and what ``run`` needs to know of their positions."""
        raise NotImplementedError

    def run(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> Tokens:
        """Run one block of the host; blocks count from 1. ``mask`` is a fusion's, for the last block."""
        if tokens.gate is not None:
            return self.mlp(block, self.attend(block, tokens, position))
        module = self.host.blocks[block - 1]
        return tokens.replace(self._call(module, tokens.x, **self._arguments(block, tokens, position, mask)))

    def attend(self, block: int, tokens: Tokens, position: Any) -> Tokens:
        """The first half of a block: attention, added to its input. Needs ``verify_halves``."""

        def half(x: Tensor) -> Tensor:
            module = self.host.blocks[block - 1]
            normed = module.norm1(x)
            if tokens.gate is None:
                found = module.attn(normed, **self._arguments(block, tokens, position))
            else:
                heads = gated_attention(*self._project(block, normed, tokens, position), tokens.gate, self.prefix)
                found = module.attn.norm(heads.transpose(1, 2).flatten(2))
                if module.attn.gate is not None:
                    found = found * module.attn.gate(normed).sigmoid()
                found = module.attn.proj_drop(module.attn.proj(found))
            return x + module.drop_path1(self._scale(module, 1, found))

        return tokens.replace(self._call(half, tokens.x))

    def mlp(self, block: int, tokens: Tokens) -> Tokens:
        """The second half: MLP, added to its input. Both halves equal the block to the bit."""

        def half(x: Tensor) -> Tensor:
            module = self.host.blocks[block - 1]
            return x + module.drop_path2(self._scale(module, 2, module.mlp(module.norm2(x))))

        return tokens.replace(self._call(half, tokens.x))

    def _arguments(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments of a block, and of its attention: the mask of a fusion or the bias of the tokens."""
        return {"attn_mask": tokens.bias(_compute_dtype(tokens.x)) if mask is None else mask}

    def _scale(self, module: Any, half: int, x: Tensor) -> Tensor:
        """LayerScale of the first or second half of a block."""
        raise NotImplementedError

    def _project(self, block: int, normed: Tensor, tokens: Tokens, position: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries, keys and values [B, H, L, d] as they enter a block's attention, from its normed input."""
        raise NotImplementedError

    def keys(self, block: int, tokens: int) -> int:
        """How many tokens each of the ``tokens`` (prefix included) attends to in this block."""
        return tokens

    def verify_counts(self, entering: Sequence[int]) -> None:
        """Refuse a schedule that leaves a block with a count that it cannot take.

        Args:
            entering: patch tokens that enter each block.

        Raises:
            ValueError: count, block and counts that fit.
        """

    def cls_attention(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        """Attention that the CLS query pays to each patch in this block, [B, H, N] float32.

        ``tokens`` are the block's input, here and below. Only this row is computed; the block itself stays on fused
        attention.
        """
        raise NotImplementedError

    def mean_key(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        """Keys before rotary positions, averaged over heads: [B, L, d]."""
        raise NotImplementedError

    def value_norms(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        """Euclidean norm of each patch's value, [B, H, N] float32."""
        raise NotImplementedError

    def column_sums(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        """Attention that each patch receives, summed over heads and queries: [B, N] float32. Computes all of it."""
        with torch.no_grad():
            query, key, _ = self._project(block, self._normed(block, tokens), tokens, position)
            logits = (query @ key.transpose(2, 3)).float()
            bias = tokens.bias(torch.float32)
            rows = (logits if bias is None else logits + bias).softmax(dim=3)
            return rows.sum(dim=(1, 2))[:, self.prefix :]

    def reading_macs(self, field: str, tokens: int) -> int:
        """Multiply-adds of one image for a field of ``Context``; ``tokens`` with prefix."""
        dim = self.dim
        cost = {
            "pixels": 0,
            "cls_attention": (1 + tokens) * dim * dim + tokens * dim,
            "mean_key": tokens * dim * dim,
            "value_norms": (tokens - self.prefix) * dim * dim,
            "column_sums": 3 * tokens * dim * dim + tokens**2 * dim,
        }
        return cost[field]

    def verify_reducer(self, reducer: Any) -> None:
        """Refuse a reducer (``cropr.pruning.reducers.Reducer``) that needs what this host cannot do.

        Raises:
            TypeError: what is missing or not supported, by name.
        """
        name = type(reducer).__name__
        if "cls_attention" in reducer.reads and self.host.cls_token is None:
            raise self._refuse(f"no class token, for {name}, which reads its attention,")
        for module in self.host.blocks:
            reads = reducer.reads - {"pixels"} or "gate" in reducer.sets
            if reads and type(found := getattr(module, "attn", module)) is not self.attention_type:
                raise self._refuse(f"attention of type {type(found).__name__}, for {name}, which reads it,")
            halves = reducer.place == "after_attention" or "gate" in reducer.sets
            if halves and type(module) not in self.halved_types:
                raise self._refuse(f"blocks of type {type(module).__name__}, for {name}, which acts within them,")
        if reducer.sets and getattr(self.host, "attn_pool", None) is not None:
            raise self._refuse(f"attention pooling, for {name}, whose tokens differ in weight,")

    def norm(self, tokens: Tokens) -> Tokens:
        """The host's norm after the last block."""
        return tokens.replace(self.host.norm(tokens.x))

    def head(self, tokens: Tokens) -> Tensor:
        """The host's own pooling and classifier: [B, classes]. A mean weighs tokens by size, validity and gate."""
        weight, host = tokens.weight, self.host
        if weight is None or host.global_pool == "token":
            return host.forward_head(tokens.x)
        if host.global_pool != "avg":
            raise self._refuse(f"pooling {host.global_pool!r}, for tokens that differ in weight,")
        lead = self.prefix if getattr(host, "pool_include_prefix", False) else 0
        weight = F.pad(weight, (lead, 0), value=1.0).unsqueeze(1)
        total = weight.sum(dim=2).clamp(min=1).to(tokens.x.dtype)  # gates may all be closed
        mean = (weight.to(tokens.x.dtype) @ tokens.x[:, self.prefix - lead :]).squeeze(1) / total
        return host.head(host.head_drop(host.fc_norm(mean)))

    def predict(self, tokens: Tokens) -> Tokens:
        """The host's classifier on every token, without its pooling: values [B, P + N, classes]."""
        host = self.host
        return tokens.replace(host.head(host.head_drop(host.fc_norm(tokens.x))))

    def verify_predict(self) -> None:
        """Refuse hosts without a classifier that suits single tokens.

        Raises:
            TypeError: what stands against it, by name.
        """
        if getattr(self.host, "attn_pool", None) is not None:
            raise self._refuse("attention pooling, for a prediction per patch,")
        if getattr(self.host, "head_dist", None) is not None:
            raise self._refuse("a second head for distillation, for a prediction per patch,")
        if not isinstance(self.host.head, nn.Linear):
            raise self._refuse("no classes (num_classes=0), for a prediction per patch,")

    def _normed(self, block: int, tokens: Tokens) -> Tensor:
        """Input of a block's attention: after its first norm, if that comes before."""
        module = self.host.blocks[block - 1]
        return module.norm1(tokens.x) if type(module) in self.halved_types else tokens.x

    def _call(self, function: Callable[..., Tensor], x: Tensor, **arguments: Any) -> Tensor:
        """A block or a half of one, under the host's own activation checkpointing switch."""
        if self.host.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, x, use_reentrant=False, **arguments)
        return function(x, **arguments)

    def _verify(self) -> None:
        if type(self.host).forward_features is not self.host_type.forward_features:  # type: ignore[attr-defined]
            raise self._refuse("a forward_features of its own")
        for module in self.host.blocks:
            if type(module) not in self.block_types:
                names = [kind.__name__ for kind in self.block_types]
                raise TypeError(f"no adapter for block type {type(module).__name__}; supported: {names}")
        drop = getattr(self.host, "patch_drop", None)
        if drop is not None and not isinstance(drop, nn.Identity):
            raise self._refuse("patch dropout (patch_drop_rate > 0)")

    def _refuse(self, what: str) -> TypeError:
        return TypeError(
            f"{type(self.host).__name__} with {what} cannot be pruned; see cropr.pruning.backbones for what can"
        )


def adapt(host: nn.Module) -> Backbone:
    """The adapter for a model of a host library.

    Raises:
        TypeError: no adapter for this model or its blocks, with the supported ones.
    """
    for kind in type(host).__mro__:
        if found := _adapters().get(f"{kind.__module__}.{kind.__qualname__}"):
            module, adapter = found
            backbone: Backbone = getattr(import_module(module), adapter)(host)
            return backbone
    supported = [f"{name.partition('.')[0]} {name.rpartition('.')[2]}" for name in _adapters()]
    raise TypeError(f"no adapter for {type(host).__name__}; supported: {supported}")


@cache
def _adapters() -> dict[str, tuple[str, str]]:
    """Dotted name of a host's class -> module and name of its adapter."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return {host: (module, name) for file in files for module, host, name in declared(file, "ADAPTERS")}


def cls_row(logits: Tensor, tokens: Tokens) -> Tensor:
    """Attention of the CLS query to the patches, [B, H, N], from its scaled logits [B, H, L]."""
    bias = tokens.bias(torch.float32)
    logits = logits.float() if bias is None else logits.float() + bias.squeeze(2)
    return logits.softmax(dim=-1)[:, :, tokens.prefix :]


def gated_attention(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, prefix: int) -> Tensor:
    """Attention [B, H, L, d] in which others see a patch as far as its gate [B, N] is open, and each token itself.

    The gate multiplies the exponential, so that a gradient reaches closed gates: no fused kernel does that. Query
    (scaled), key and value are [B, H, L, d]. As in DynamicViT, with its epsilon.
    """
    length, epsilon = query.shape[2], 1e-6
    logits = (query @ key.transpose(2, 3)).float()
    seen = F.pad(gate, (prefix, 0), value=1.0)[:, None, None]
    own = torch.eye(length, device=gate.device)
    weight = (logits - logits.amax(dim=3, keepdim=True)).exp() * (seen + (1 - seen) * own)
    weight = (weight + epsilon / length) / (weight.sum(dim=3, keepdim=True) + epsilon)
    return weight.to(value.dtype) @ value


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Precision of the attention on x: that of autocast where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
