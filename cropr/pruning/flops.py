"""Multiply-adds of a model: torch's ``FlopCounterMode`` on tensors without memory.

Counted are the matrix products and convolutions of the inference graph, attention's two products included. Norms,
activations, softmax, rotary positions, top-k and copies are left out. One multiply-add is two FLOPs.

The counter knows no fused attention on the CPU, so torch's plain kernel is forced while it counts. It knows no product
of a matrix and a vector, with which a folded scorer scores, so a formula for it is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from cropr.pruning.backbones import Backbone, adapt
from cropr.pruning.model import DeployedViT
from cropr.pruning.reducers.base import Reducer
from cropr.pruning.schedule import attended

_ATTENTION, _VECTOR = "aten.bmm", "aten.mv"


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiply-adds of one image."""

    total: int
    linear: int
    """Convolutions and linear layers alone: of this kind are the published numbers of the detector's encoder."""


def macs(model: nn.Module) -> Macs:
    """Count one image of the size that the model was built for. ``model`` is a host that has an adapter or a
    ``DeployedViT``, on any device; parameters without memory will do."""
    backbone = model.model.backbone if isinstance(model, DeployedViT) else adapt(model)
    found = counts(model, _image(backbone))["Global"]
    total = sum(found.values())
    return Macs(total, total - found.get(_ATTENTION, 0) - found.get(_VECTOR, 0))


def counts(module: nn.Module, *inputs: Any) -> dict[str, dict[str, int]]:
    """Multiply-adds of a call by part of the module (``Global`` is all of it) and operator. Of ``inputs``, tensors or
    lists of them, and of the module's parameters and buffers, only shapes and dtypes count."""
    matrix_vector = {torch.ops.aten.mv: lambda matrix, *_, **__: 2 * matrix[0] * matrix[1]}
    counter = FlopCounterMode(display=False, custom_mapping=matrix_vector)
    # Hosts that cache tensors, such as DINOv3's coordinates, do not while they are compiled: these have no values. The
    # inference kernel of ``nn.MultiheadAttention`` would hide its products.
    compiling = patch.object(torch.compiler, "is_compiling", lambda: True)
    plain = patch.object(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), compiling, plain, counter, torch.no_grad():
        named = chain(module.named_parameters(), module.named_buffers())
        functional_call(module, {name: _blank(tensor) for name, tensor in named}, tree_map(_blank, inputs))
    return {part: {str(op): n // 2 for op, n in found.items()} for part, found in counter.get_flop_counts().items()}


class Cost:
    """Multiply-adds of a pruned model as a function of its token counts; from one count of the unpruned host.

    Linear layers cost the same for every token; attention's products grow with the tokens that each attends to. The
    reducer, and what is computed for it to read, are added by their own formulas. ``model`` is a host, or an adapter
    around one; raises TypeError for a model without adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.backbone = backbone = model if isinstance(model, Backbone) else adapt(model)
        found = counts(backbone.host, _image(backbone))
        names = {module: f"{type(backbone.host).__name__}.{name}" for name, module in backbone.host.named_modules()}
        self._blocks = [found[names[block]] for block in backbone.blocks]
        self._mlp = [sum(found.get(f"{names[block]}.mlp", {}).values()) for block in backbone.blocks]
        self._fixed = sum(found["Global"].values()) - sum(sum(block.values()) for block in self._blocks)
        self._full = backbone.num_patches + backbone.prefix

    def block(self, number: int, tokens: int) -> int:
        """One block (from 1) on so many tokens, prefix included."""
        found = self._blocks[number - 1]
        products = found.get(_ATTENTION, 0)
        linear = (sum(found.values()) - products) * tokens // self._full
        return linear + products * tokens * self.backbone.keys(number, tokens) // self._full**2

    def total(self, alive: Sequence[int], fused: bool, reducer: Reducer | None = None) -> int:
        """The whole model, deployed, with ``alive`` patch tokens after each block, as ``Schedule.resolve`` gives them.
        If ``fused``, pruned tokens come back before the last block. ``reducer`` is one of its own; None is Cropr's."""
        backbone = self.backbone
        entering = attended(tuple(alive), backbone.num_patches, fused, backbone.prefix)
        total = self._fixed
        for number, (count, left) in enumerate(zip(entering, alive, strict=True), start=1):
            total += self.block(number, count)
            if left + backbone.prefix < count:
                total += count * backbone.dim if reducer is None else self._reduction(reducer, number, count, left)
        return total

    def _reduction(self, reducer: Reducer, number: int, tokens: int, keep: int) -> int:
        """What a reducer adds to its block, on so many tokens, and what it saves if the MLP runs after it."""
        backbone = self.backbone
        patches, head = tokens - backbone.prefix, backbone.dim // backbone.heads
        added = reducer.macs(tokens, patches, keep, backbone.dim, head)
        added += sum(backbone.reading_macs(field, tokens) for field in reducer.reads)
        saved = (patches - keep) * self._mlp[number - 1] // self._full if reducer.place == "after_attention" else 0
        return added - saved


def _image(backbone: Backbone) -> Tensor:
    weight = next(backbone.parameters())
    return torch.empty(1, 3, *backbone.image_size, dtype=weight.dtype, device="meta")


def _blank(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)
