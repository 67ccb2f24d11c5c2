"""Hugging Face transformers: ViT, DeiT, DINOv2 (also with registers), DINOv3 ViT, and the vision towers of CLIP and
SigLIP; bare models, classifiers, and CLIP with projection; any attention implementation. Versions 4.57 and 5.

``Output.logits`` of a bare model is its ``pooler_output``, and ``Output.tokens.x`` is ``last_hidden_state`` of the
tokens alive. ``as_host`` gives a model of the host's own class, for pipelines and for models that contain it.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cropr.pruning.backbones.base import Backbone, _compute_dtype
from cropr.pruning.tokens import Tokens

_FAMILIES = ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "CLIPEncoder", "SiglipEncoder")


class HuggingFaceBackbone(Backbone):
    """``body`` is the bare model within the host, which has the embeddings; the host itself if it has no head."""

    def __init__(self, host: nn.Module) -> None:
        modules = {name: module for name, module in host.named_modules() if hasattr(module, "embeddings")}
        self._body = min(modules, key=len)
        lists = (name for name, module in modules[self._body].named_modules() if isinstance(module, nn.ModuleList))
        self._blocks = next(lists)
        super().__init__(host)

    @property
    def body(self) -> Any:
        """The bare model."""
        return self.host.get_submodule(self._body)

    @property
    def blocks(self) -> Sequence[Any]:
        return self.body.get_submodule(self._blocks)

    @property
    def dim(self) -> int:
        return self.body.config.hidden_size

    @property
    def heads(self) -> int:
        return self.body.config.num_attention_heads

    @property
    def prefix(self) -> int:
        embeddings = self.body.embeddings
        single = [name for name in ("cls_token", "class_embedding", "distillation_token") if hasattr(embeddings, name)]
        registers = getattr(embeddings, "register_tokens", None)
        return len(single) + (0 if registers is None else registers.shape[1])

    @property
    def pools_by_attention(self) -> bool:
        return hasattr(self.body, "head") and not hasattr(self.host, "classifier")

    @property
    def num_classes(self) -> int:
        return getattr(self.host, "num_labels", 0) if _has_classifier(self.host) else 0

    @property
    def image_size(self) -> tuple[int, int]:
        return _pair(self.body.config.image_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        return _pair(self.body.config.patch_size)

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        """Also the sines and cosines of DINOv3's rotary positions, [N, d] each."""
        body = self.body
        images = images.to(body.dtype) if hasattr(body, "dtype") else images
        x = body.embeddings(images)
        x = body.pre_layrnorm(x) if hasattr(body, "pre_layrnorm") else x
        return Tokens.full(x, self.prefix), body.rope_embeddings(images) if hasattr(body, "rope_embeddings") else None

    def _arguments(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> dict[str, Any]:
        dtype = _compute_dtype(tokens.x)
        if mask is None:
            bias = tokens.bias(dtype)
        else:
            bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)[None, None]
        layer = type(self.blocks[block - 1])
        found: dict[str, Any] = {"attention_mask": bias} if _accepts(layer, "attention_mask") else {}
        if _accepts(layer, "causal_attention_mask"):  # CLIP of version 4
            found["causal_attention_mask"] = None
        return found if position is None else {**found, "position_embeddings": self._rows(tokens, position)}

    def run(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> Tokens:
        found = self.blocks[block - 1](tokens.x, **self._arguments(block, tokens, position, mask))
        return tokens.replace(found[0] if isinstance(found, tuple) else found)

    def norm(self, tokens: Tokens) -> Tokens:
        """CLIP normalises the pooled token alone."""
        if hasattr(self.body, "pre_layrnorm"):
            return tokens
        return tokens.replace(_first(self.body, "layernorm", "norm", "post_layernorm")(tokens.x))

    def head(self, tokens: Tokens) -> Tensor:
        host, x = self.host, tokens.x
        if hasattr(host, "cls_classifier"):
            return (host.cls_classifier(x[:, 0]) + host.distillation_classifier(x[:, 1])) / 2
        if not hasattr(host, "classifier"):
            pooled = self._pooled(tokens)
            return host.visual_projection(pooled) if hasattr(host, "visual_projection") else pooled
        if type(self.body).__name__.startswith("Dinov2"):
            return host.classifier(torch.cat((x[:, 0], self._mean(tokens)), dim=1))
        by_mean = hasattr(self.body, "post_layernorm")  # CLIP, SigLIP
        return host.classifier(self._mean(tokens) if by_mean else x[:, 0])

    def _pooled(self, tokens: Tokens) -> Tensor:
        """``pooler_output`` of the body; where it has none, the class token, or the mean."""
        body, x = self.body, tokens.x
        if hasattr(body, "pre_layrnorm"):
            return body.post_layernorm(x[:, 0])
        if hasattr(body, "post_layernorm"):
            return body.head(x) if hasattr(body, "head") else self._mean(tokens)
        return body.pooler(x) if getattr(body, "pooler", None) is not None else x[:, 0]

    def _attended(self, module: Any, x: Tensor, block: int, tokens: Tokens, position: Any) -> Tensor:
        normed = _first(module, *_NORMS[0])(x)
        found = _first(module, "self_attn", "attention")(normed, **self._arguments(block, tokens, position))
        return x + _scaled(module, 1, found[0] if isinstance(found, tuple) else found)

    def _transformed(self, module: Any, x: Tensor) -> Tensor:
        return x + _scaled(module, 2, module.mlp(_first(module, *_NORMS[1])(x)))

    def _normed(self, block: int, tokens: Tokens) -> Tensor:
        return _first(self.blocks[block - 1], *_NORMS[0])(tokens.x)

    def _part(self, block: int, part: int, x: Tensor) -> Tensor:
        attention = _first(self.blocks[block - 1], "self_attn", "attention")
        attention = getattr(attention, "attention", attention)
        names = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))[part]
        found = _first(attention, *names)(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return found * found.shape[3] ** -0.5 if part == 0 else found

    def _turn(self, block: int, x: Tensor, tokens: Tokens, position: Any) -> Tensor:
        if position is None:
            return x
        rotate = sys.modules[type(self.blocks[block - 1]).__module__].apply_rotary_pos_emb
        return rotate(x, x, *self._rows(tokens, position))[0]

    def _rows(self, tokens: Tokens, position: Any) -> tuple[Tensor, Tensor]:
        """Rotary rows of the tokens alive, cosines and sines: [B, 1, N, d]."""
        assert tokens.index is not None
        cosine, sine = (F.embedding(tokens.index, table).unsqueeze(1) for table in position)
        return cosine, sine

    def verify_reducer(self, reducer: Any) -> None:
        super().verify_reducer(reducer)
        if reducer.slots and hasattr(self.body, "rope_embeddings"):
            raise self._refuse(f"rotary positions, for {type(reducer).__name__}, whose tokens have no place,")

    def _can_read(self, module: Any) -> bool:
        return True

    def _can_halve(self, module: Any) -> bool:
        return hasattr(module, "mlp")

    def _can_mask(self, module: Any) -> bool:
        return _accepts(type(module), "attention_mask")

    def _verify(self) -> None:
        for module in self.blocks:
            if type(module).__name__ not in [f"{name}Layer" for name in _FAMILIES]:
                raise TypeError(f"no adapter for block type {type(module).__name__}; supported: {_FAMILIES}")
        if self.body.config._attn_implementation not in ("eager", "sdpa"):
            raise self._refuse(f"attention {self.body.config._attn_implementation!r} (supported: 'eager', 'sdpa')")


def as_host(model: Any) -> Any:
    """A model of the host's own class around a pruned one: for pipelines, and for models that contain the host.

    It takes ``pixel_values`` and gives the output of the host's class; ``last_hidden_state`` holds the tokens alive, in
    raster order, and of ``hidden_states`` there is the last alone (``hidden_states[-1]``).

    Args:
        model: a ``PrunedViT`` or ``DeployedViT`` around a Hugging Face host. Weights are shared, not copied.

    Raises:
        TypeError: a model around another host.
    """
    backbone = getattr(model, "model", model).backbone
    if not isinstance(backbone, HuggingFaceBackbone):
        raise TypeError(f"as_host takes Hugging Face hosts, not {type(backbone.host).__name__}")
    body = copy.copy(backbone.body)
    body._modules, body._parameters, body._buffers = {"pruned": model}, {}, {}
    body.forward = MethodType(_forward, body)
    if backbone.body is backbone.host:
        return body
    host = copy.copy(backbone.host)
    host._modules = {**host._modules, backbone._body: body}
    return host


def _forward(
    self: Any, pixel_values: Tensor, return_dict: bool | None = None, output_hidden_states: bool = False, **_: Any
) -> Any:
    """Forward of the bare model that ``as_host`` makes."""
    model = getattr(self.pruned, "model", self.pruned)
    tokens = model(pixel_values).tokens
    tokens = tokens if model.fusion is None else tokens.raster()
    states = (tokens.x,) if output_hidden_states else None
    found = BaseModelOutputWithPooling(tokens.x, model.backbone._pooled(tokens), hidden_states=states)
    return found.to_tuple() if return_dict is False else found


_NORMS = (("layernorm_before", "norm1", "layer_norm1"), ("layernorm_after", "norm2", "layer_norm2"))
_IDENTITY = nn.Identity()


def _first(module: Any, *names: str) -> Any:
    """The part of a module that has the first of these names: families and versions differ in them."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _scaled(module: Any, half: int, x: Tensor) -> Tensor:
    """Dropout, or LayerScale and drop path, of a half of a layer."""
    scaled = getattr(module, f"layer_scale{half}", _IDENTITY)(x)
    return getattr(module, "drop_path", getattr(module, "dropout", _IDENTITY))(scaled)


def _has_classifier(host: Any) -> bool:
    return hasattr(host, "classifier") or hasattr(host, "cls_classifier")


@cache
def _accepts(layer: type[nn.Module], name: str) -> bool:
    """Whether a layer's forward has an argument of this name."""
    return name in inspect.signature(layer.forward).parameters


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


ADAPTERS = {
    "transformers.models.vit.modeling_vit.ViTModel": "HuggingFaceBackbone",
    "transformers.models.vit.modeling_vit.ViTForImageClassification": "HuggingFaceBackbone",
    "transformers.models.deit.modeling_deit.DeiTModel": "HuggingFaceBackbone",
    "transformers.models.deit.modeling_deit.DeiTForImageClassification": "HuggingFaceBackbone",
    "transformers.models.deit.modeling_deit.DeiTForImageClassificationWithTeacher": "HuggingFaceBackbone",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model": "HuggingFaceBackbone",
    "transformers.models.dinov2.modeling_dinov2.Dinov2ForImageClassification": "HuggingFaceBackbone",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel": (
        "HuggingFaceBackbone"
    ),
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers."
    "Dinov2WithRegistersForImageClassification": "HuggingFaceBackbone",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel": "HuggingFaceBackbone",
    "transformers.models.clip.modeling_clip.CLIPVisionModel": "HuggingFaceBackbone",
    "transformers.models.clip.modeling_clip.CLIPVisionModelWithProjection": "HuggingFaceBackbone",
    "transformers.models.clip.modeling_clip.CLIPForImageClassification": "HuggingFaceBackbone",
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": "HuggingFaceBackbone",
    "transformers.models.siglip.modeling_siglip.SiglipForImageClassification": "HuggingFaceBackbone",
}
