"""What the pruned model asks of a host, and which adapter fits a host.

An adapter's file declares the classes that it adapts as a literal, so that only the file that is needed is imported:
``ADAPTERS = {"timm.models.vision_transformer.VisionTransformer": "ViTBackbone"}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cropr.pruning.fusion import Fusion
from cropr.pruning.methods import declared
from cropr.pruning.tokens import Tokens


class Backbone(nn.Module):
    """Adapter to a model of a host library: runs the host's own blocks, copies none of its code.

    A subclass sets the attributes below and gives ``embed``, ``norm`` and ``head``. For methods that read attention it
    gives ``_part`` (and ``_turn`` for rotary positions), for those that act within a block ``_attended`` and
    ``_transformed``; what it does not give is refused by name.

    ``host`` is kept as it is, and its parameters keep their names below ``host``. Raises TypeError for a feature of it
    that pruning would silently break, by name.
    """

    path: str  # name of the blocks in the host
    block_types: ClassVar[tuple[type[nn.Module], ...]]  # classes of blocks that can be run one by one
    host_type: ClassVar[type[nn.Module]]  # a subclass must not have an ``entry`` of its own, which we would skip
    entry: ClassVar[str] = "forward"
    switch: ClassVar[str | None] = None  # name of the host's flag for checkpointing, where the blocks do not see to it
    masks: bool = True  # the attention of the blocks takes a mask
    gates: ClassVar[bool] = False  # it can be replaced by one with DynamicViT's gates
    dim: int  # C, channels of the tokens
    heads: int  # H
    prefix: int  # P
    has_cls: bool = True  # the first prefix token is a class token
    num_classes: int = 0  # outputs of the host's classifier; 0 if it has none
    pools_by_attention: bool = False  # the head pools by attention, which knows no weights of tokens
    rotary: bool = False  # tokens need a place for their rotary positions
    image_size: tuple[int, int]  # rows and columns of the images that the host was built for, in pixels
    patch_size: tuple[int, int]
    host: Any

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self._verify()

    @property
    def blocks(self) -> Sequence[Any]:
        """The host's blocks, in order."""
        return self.host.get_submodule(self.path)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the patch grid of an image of the size that the host was built for."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        """Patch tokens of such an image."""
        return math.prod(self.grid_size)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the patch grid of images [B, 3, H, W]."""
        rows, columns = self.patch_size
        return images.shape[-2] // rows, images.shape[-1] // columns

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        """Images [B, 3, H, W] to all tokens before block 1, and what ``run`` needs to know of their positions."""
        raise NotImplementedError

    def run(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> Tokens:
        """Run a block of the host; blocks count from 1. ``mask`` is a fusion's, for the last block."""
        if tokens.gate is not None:
            return self.mlp(block, self.attend(block, tokens, position))
        found = self._call(self.blocks[block - 1], tokens.x, **self._arguments(block, tokens, position, mask))
        return tokens.replace(found[0] if isinstance(found, tuple) else found)

    def attend(self, block: int, tokens: Tokens, position: Any) -> Tokens:
        """The first half of a block: attention, added to its input. ``verify_reducer`` refuses hosts that cannot."""
        half = partial(self._attended, block, tokens=tokens, position=position)
        return tokens.replace(self._call(half, tokens.x))

    def mlp(self, block: int, tokens: Tokens) -> Tokens:
        """The second half: MLP, added to its input. Both halves equal the block to the bit."""
        return tokens.replace(self._call(partial(self._transformed, block), tokens.x))

    def _arguments(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments of a block, and of its attention: the mask of a fusion or the bias of the tokens."""
        return {} if not self.masks else {"attn_mask": tokens.bias(_compute_dtype(tokens.x)) if mask is None else mask}

    def _attended(self, block: int, x: Tensor, tokens: Tokens, position: Any) -> Tensor:
        """x [B, L, C], the values of ``tokens``, and its attention in a block."""
        raise NotImplementedError

    def _transformed(self, block: int, x: Tensor) -> Tensor:
        """x [B, L, C] and its MLP in a block."""
        raise NotImplementedError

    def _part(self, block: int, part: int, x: Tensor) -> Tensor:
        """Scaled queries (0), keys (1) or values (2) [B, H, L, d], without rotary positions, of normed x [B, L, C]."""
        raise NotImplementedError

    def _turn(self, block: int, x: Tensor, tokens: Tokens, position: Any) -> Tensor:
        """Queries or keys [B, H, L, d] with the rotary positions of their patches, if the host has any."""
        return x

    def _project(self, block: int, normed: Tensor, tokens: Tokens, position: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries, keys and values [B, H, L, d] as they enter a block's attention, from its normed input."""
        query, key = (self._turn(block, self._part(block, part, normed), tokens, position) for part in (0, 1))
        return query, key, self._part(block, 2, normed)

    def keys(self, block: int, tokens: int) -> int:
        """How many tokens each of the ``tokens`` (prefix included) attends to in this block."""
        return tokens

    def verify_counts(self, entering: Sequence[int]) -> None:
        """Refuse numbers of patch tokens that enter the blocks: ValueError with the block and numbers that fit it."""

    def cls_attention(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        """This and the next three give the fields of ``reducers.base.Context`` of their names, from the block's input.
        Only what is read is computed, beside the block, which stays on fused attention."""
        x = self._normed(block, tokens)
        key = self._turn(block, self._part(block, 1, x), tokens, position)
        return patch_attention(self._part(block, 0, x[:, :1]) @ key.transpose(2, 3), tokens).squeeze(2)

    def mean_key(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        return self._part(block, 1, self._normed(block, tokens)).mean(dim=1)

    def value_norms(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        return self._part(block, 2, self._normed(block, tokens)[:, self.prefix :]).float().norm(dim=3)

    def column_sums(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        with torch.no_grad():
            query, key, _ = self._project(block, self._normed(block, tokens), tokens, position)
            return patch_attention(query @ key.transpose(2, 3), tokens).sum(dim=(1, 2))

    def reading_macs(self, field: str, tokens: int) -> int:
        """Multiply-adds of one image for a field of ``Context``; ``tokens`` with prefix."""
        dim, projection = self.dim, tokens * self.dim**2
        cost = {"pixels": 0, "mean_key": projection, "cls_attention": dim * dim + projection + tokens * dim}
        cost |= {"value_norms": projection - self.prefix * dim * dim, "column_sums": 3 * projection + tokens**2 * dim}
        return cost[field]

    def verify_reducer(self, reducer: Any, fusion: Fusion | None = None) -> None:
        """Refuse a reducer (``cropr.pruning.reducers.Reducer``) or a fusion that needs what this host cannot do:
        TypeError with the name of what is missing."""
        name, gate = type(reducer).__name__, "gate" in reducer.sets
        if "cls_attention" in reducer.reads and not self.has_cls:
            raise self._refuse(f"no class token, for {name}, which reads its attention,")
        masked = fusion is not None and type(fusion).mask is not Fusion.mask
        for module in self.blocks:
            kind = f"blocks of type {type(module).__name__}, for {name}"
            if (reducer.reads - {"pixels"} or gate) and not self._can_read(module):
                found = type(getattr(module, "attn", module)).__name__
                raise self._refuse(f"attention of type {found}, for {name}, which reads it,")
            if (reducer.place == "after_attention" or gate) and not (self._can_halve(module) and gate <= self.gates):
                raise self._refuse(f"{kind}, which acts within them,")
            if (reducer.sets or masked) and not self.masks:
                raise self._refuse(f"{kind} with a mask, which they do not take,")
        if reducer.slots and self.rotary:
            raise self._refuse(f"rotary positions, for {name}, whose tokens have no place,")
        if reducer.sets and self.pools_by_attention:
            raise self._refuse(f"attention pooling, for {name}, whose tokens differ in weight,")

    def _can_read(self, module: Any) -> bool:
        """Whether ``_part`` knows this block."""
        return type(self)._part is not Backbone._part

    def _can_halve(self, module: Any) -> bool:
        """Whether ``_attended`` and ``_transformed`` know this block: a norm before each half."""
        return type(self)._attended is not Backbone._attended

    def norm(self, tokens: Tokens) -> Tokens:
        """The host's norm after the last block, if all tokens pass it."""
        raise NotImplementedError

    def head(self, tokens: Tokens) -> Tensor:
        """The host's own pooling and classifier: [B, classes], or pooled [B, channels]. Means use ``Tokens.weight``."""
        raise NotImplementedError

    def _mean(self, tokens: Tokens, lead: int = 0) -> Tensor:
        """Mean of the patch tokens and of the last ``lead`` prefix tokens, weighted where tokens differ: [B, C]."""
        weight, x = tokens.weight, tokens.x[:, self.prefix - lead :]
        if weight is None:
            return x.mean(dim=1)
        weight = F.pad(weight, (lead, 0), value=1.0).unsqueeze(2)
        total = weight.sum(dim=1).clamp(min=1)  # gates may all be closed
        return ((weight * x).sum(dim=1) / total).to(x.dtype)

    def predict(self, tokens: Tokens) -> Tokens:
        """The host's classifier on every token, without its pooling: values [B, P + N, classes]."""
        raise NotImplementedError

    def verify_predict(self) -> None:
        """Refuse hosts without a classifier that suits single tokens: TypeError with what stands against it."""
        raise self._refuse("this head, for a prediction per patch,")

    def _normed(self, block: int, tokens: Tokens) -> Tensor:
        """Input of a block's attention: after its first norm, if that comes before."""
        raise NotImplementedError

    def _call(self, function: Callable[..., Tensor], x: Tensor, **arguments: Any) -> Tensor:
        """A block or a half of one, under the host's own activation checkpointing switch."""
        on = self.switch is not None and attrgetter(self.switch)(self.host)
        if on and self.training and torch.is_grad_enabled():
            return checkpoint(function, x, use_reentrant=False, **arguments)
        return function(x, **arguments)

    def _verify(self) -> None:
        if getattr(type(self.host), self.entry) is not getattr(self.host_type, self.entry):
            raise self._refuse(f"a {self.entry} of its own")
        for module in self.blocks:
            if type(module) not in self.block_types:
                names = [kind.__name__ for kind in self.block_types]
                raise TypeError(f"no adapter for block type {type(module).__name__}; supported: {names}")

    def _refuse(self, what: str) -> TypeError:
        return TypeError(f"{type(self.host).__name__} with {what} cannot be pruned; docs/hosts.md says what can")


def adapt(host: nn.Module) -> Backbone:
    """The adapter for a model of a host library; TypeError for a model without, with the supported ones."""
    adapters = _adapters()
    for kind in type(host).__mro__:
        for name in (f"{kind.__module__}.{kind.__qualname__}", kind.__module__):
            if name in adapters:
                module, adapter = adapters[name]
                return getattr(import_module(module), adapter)(host)
    supported = [f"{name.partition('.')[0]} {name.rpartition('.')[2].removeprefix('modeling_')}" for name in adapters]
    raise TypeError(f"no adapter for {type(host).__name__}; supported: {supported}")


@cache
def _adapters() -> dict[str, tuple[str, str]]:
    """Dotted name of a host's class -> module and name of its adapter."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return {host: (module, name) for file in files for module, host, name in declared(file, "ADAPTERS")}


def patch_attention(logits: Tensor, tokens: Tokens) -> Tensor:
    """Attention [B, H, Q, N] float32 of Q queries to the patches, from its scaled logits [B, H, Q, L]."""
    bias = tokens.bias(torch.float32)
    logits = logits.float() if bias is None else logits.float() + bias
    return logits.softmax(dim=3)[:, :, :, tokens.prefix :]


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
