"""Hugging Face transformers: ViT, DeiT, DINOv2 (also with registers), DINOv3 ViT, vision towers of CLIP and
SigLIP; bare models, classifiers, and CLIP with projection; eager and SDPA attention (outputs: docs/hosts.md).
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cropr.pruning.backbones.base import Backbone, _compute_dtype
from cropr.pruning.tokens import Tokens

_HOST = r".*((?<!CLIP|glip|Text)Model|VisionTransformer|ForImageClassification\w*)|CLIPVisionModelWithProjection"
_FAMILIES = ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "CLIPEncoder", "SiglipEncoder")


class HuggingFaceBackbone(Backbone):
    """``body`` is the bare model within the host, which has the embeddings; the host itself if it has no head."""

    def __init__(self, host: nn.Module) -> None:
        self._body = min((name for name, part in host.named_modules() if hasattr(part, "embeddings")), key=len)
        body: Any = host.get_submodule(self._body)
        lists = (name for name, part in body.named_modules() if isinstance(part, nn.ModuleList))
        self.path = f"{self._body}.{next(lists)}".lstrip(".")
        super().__init__(host)
        self._takes = frozenset(inspect.signature(type(self.blocks[0]).forward).parameters)
        self.masks = "attention_mask" in self._takes
        config, embeddings = body.config, body.embeddings
        self.dim, self.heads = config.hidden_size, config.num_attention_heads
        self.image_size, self.patch_size = _pair(config.image_size), _pair(config.patch_size)
        registers = getattr(embeddings, "register_tokens", None)
        self.prefix = 0 if registers is None else registers.shape[1]
        self.prefix += sum(hasattr(embeddings, name) for name in ("cls_token", "class_embedding", "distillation_token"))
        self.has_cls = self.prefix > 0
        classifies = hasattr(host, "classifier") or hasattr(host, "cls_classifier")
        self.num_classes = self.host.num_labels if classifies else 0
        self.rotary = hasattr(body, "rope_embeddings")
        self.pools_by_attention = hasattr(body, "head") and not classifies

    @property
    def body(self) -> Any:
        """The bare model."""
        return self.host.get_submodule(self._body)

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        """Also the sines and cosines of DINOv3's rotary positions, [N, d] each."""
        body = self.body
        images = images.to(body.dtype) if hasattr(body, "dtype") else images
        x = body.embeddings(images)
        x = body.pre_layrnorm(x) if hasattr(body, "pre_layrnorm") else x
        return Tokens.full(x, self.prefix), body.rope_embeddings(images) if self.rotary else None

    def _arguments(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> dict[str, Any]:
        dtype = _compute_dtype(tokens.x)
        if mask is None:
            bias = tokens.bias(dtype)
        else:
            bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)[None, None]
        found: dict[str, Any] = {"attention_mask": bias} if self.masks else {}
        if "causal_attention_mask" in self._takes:  # CLIP of version 4
            found["causal_attention_mask"] = None
        return found if position is None else {**found, "position_embeddings": self._rows(tokens, position)}

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

    def _attended(self, block: int, x: Tensor, tokens: Tokens, position: Any) -> Tensor:
        module = self.blocks[block - 1]
        normed = _first(module, *_NORMS[0])(x)
        found = _first(module, "self_attn", "attention")(normed, **self._arguments(block, tokens, position))
        return x + _scaled(module, 1, found[0] if isinstance(found, tuple) else found)

    def _transformed(self, block: int, x: Tensor) -> Tensor:
        module = self.blocks[block - 1]
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

    def _can_halve(self, module: Any) -> bool:
        return hasattr(module, "mlp")

    def _verify(self) -> None:
        kind = type(self.host)
        if not re.fullmatch(_HOST, kind.__name__) or not kind.__module__.startswith("transformers."):
            raise self._refuse("this head, forward or text tower (supported: vision models, bare or with a classifier)")
        for module in self.blocks:
            if type(module).__name__ not in [f"{name}Layer" for name in _FAMILIES]:
                raise TypeError(f"no adapter for block type {type(module).__name__}; supported: {_FAMILIES}")
        if self.body.config._attn_implementation not in ("eager", "sdpa"):
            raise self._refuse(f"attention {self.body.config._attn_implementation!r} (supported: 'eager', 'sdpa')")


_NORMS = (("layernorm_before", "norm1", "layer_norm1"), ("layernorm_after", "norm2", "layer_norm2"))
_IDENTITY = nn.Identity()


def _first(module: Any, *names: str) -> Any:
    """The part of a module that has the first of these names: families and versions differ in them."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _scaled(module: Any, half: int, x: Tensor) -> Tensor:
    """Dropout, or LayerScale and drop path, of a half of a layer."""
    scaled = getattr(module, f"layer_scale{half}", _IDENTITY)(x)
    return getattr(module, "drop_path", getattr(module, "dropout", _IDENTITY))(scaled)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


ADAPTERS = {
    "transformers.models.vit.modeling_vit": "HuggingFaceBackbone",
    "transformers.models.deit.modeling_deit": "HuggingFaceBackbone",
    "transformers.models.dinov2.modeling_dinov2": "HuggingFaceBackbone",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers": "HuggingFaceBackbone",
    "transformers.models.dinov3_vit.modeling_dinov3_vit": "HuggingFaceBackbone",
    "transformers.models.clip.modeling_clip": "HuggingFaceBackbone",
    "transformers.models.siglip.modeling_siglip": "HuggingFaceBackbone",
}
