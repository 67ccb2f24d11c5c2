"""What the pruned model asks of a host, and which adapter fits a host.

An adapter's file declares the classes that it adapts as a literal, so that only the file that is needed is imported:
``ADAPTERS = {"timm.models.vision_transformer.VisionTransformer": "ViTBackbone"}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
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
    attention_type: ClassVar[type[nn.Module]]
    """Class of a block's ``attn`` that ``cls_attention`` can read."""
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
        """Attention that the CLS query pays to each patch in this block, averaged over heads, [B, N] float32.

        ``tokens`` are the block's input. Only this row is computed; the block itself stays on fused attention.
        """
        raise NotImplementedError

    def verify_cls_attention(self) -> None:
        """Refuse hosts whose CLS row cannot be computed.

        Raises:
            TypeError: what is missing or not supported, by name.
        """
        if self.host.cls_token is None:
            raise self._refuse("no class token, for a reducer that reads its attention,")
        for module in self.host.blocks:
            if type(getattr(module, "attn", None)) is not self.attention_type:
                raise self._refuse(f"blocks of type {type(module).__name__}, for a reducer that reads attention,")

    def norm(self, tokens: Tokens) -> Tokens:
        """The host's norm after the last block."""
        return tokens.replace(self.host.norm(tokens.x))

    def head(self, tokens: Tokens) -> Tensor:
        """The host's own pooling and classifier: [B, classes]."""
        return self.host.forward_head(tokens.x)

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

    def _call(self, block: int, x: Tensor, **arguments: Any) -> Tensor:
        """One block, under the host's own activation checkpointing switch."""
        module = self.host.blocks[block - 1]
        if self.host.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(module, x, use_reentrant=False, **arguments)
        return module(x, **arguments)

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


def cls_row(logits: Tensor, scale: float, prefix: int) -> Tensor:
    """Attention row from raw logits [B, H, L] of the CLS query: softmax, patches only, mean over heads, [B, N]."""
    return (logits.float() * scale).softmax(dim=-1)[:, :, prefix:].mean(dim=1)
