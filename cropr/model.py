"""The pruned Vision Transformer: a host's blocks, reducers between them, a fusion before the last.

B batch, P prefix tokens, N patch tokens, K kept, C channels, Q queries. Blocks count from 1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cropr import fusion as fusions
from cropr import reducers as registry
from cropr.backbones import Backbone, adapt
from cropr.reducers import Context, Reducer
from cropr.schedule import Schedule, trace
from cropr.specs import ModelSpec, PruneSpec
from cropr.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Output:
    """What a forward pass gives."""

    logits: Tensor
    """[B, classes]."""
    aux: tuple[Tensor, ...]
    """Auxiliary predictions [B, Q, outputs], one a Cropr module, in training mode; else empty."""
    tokens: Tokens
    """After the last norm. ``tokens.raster()`` sorts them by place."""
    kept: dict[int, Tensor]
    """Block -> raster indices [B, K] of the patches alive after its reducer."""

    def pruned_after(self, num_patches: int) -> Tensor:
        """[B, num_patches] int64: block after which each patch was pruned; 0 for never."""
        first = next(iter(self.kept.values()), self.tokens.index)
        after = torch.zeros(first.shape[0], num_patches, dtype=torch.int64, device=first.device)
        alive = torch.ones_like(after, dtype=torch.bool)
        for block, index in self.kept.items():
            stays = torch.zeros_like(alive).scatter(1, index, True)
            after[alive & ~stays] = block
            alive = stays
        return after


class PrunedViT(nn.Module):
    """A host with token pruning. Made by ``prune``; ``deploy`` gives its inference form.

    Args:
        backbone: adapter around the host.
        schedule: when how many tokens go.
        reducers: block -> reducer that follows it.
        fusion: brings pruned tokens back before the last block; None prunes for good.
    """

    def __init__(
        self, backbone: Backbone, schedule: Schedule, reducers: Mapping[int, Reducer], fusion: nn.Module | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.schedule = schedule
        self.reducers = nn.ModuleDict({str(block): reducer for block, reducer in reducers.items()})
        self.fusion = fusion
        self._wants_pixels = any(reducer.wants_pixels for reducer in reducers.values())
        self._counts: dict[int, tuple[int, ...]] = {}
        self.counts(backbone.num_patches)

    def counts(self, num_patches: int) -> tuple[int, ...]:
        """Patch tokens alive after each block, for an image of so many patches."""
        if num_patches not in self._counts:
            self._counts[num_patches] = self.schedule.resolve(
                num_patches, self.backbone.depth, self.fusion is not None, self.backbone.prefix
            )
        return self._counts[num_patches]

    @property
    def token_trace(self) -> tuple[int, ...]:
        """Tokens with prefix at the input and after every block: 197, 188, 180, ..."""
        num_patches = self.backbone.num_patches
        return trace(self.counts(num_patches), num_patches, self.backbone.prefix)

    def forward(self, images: Tensor) -> Output:
        """Images [B, 3, H, W], normalised, to an ``Output``."""
        tokens, position = self.backbone.embed(images)
        counts = self.counts(tokens.num_patches)
        pixels = patch_variance(images, self.backbone.grid(images)) if self._wants_pixels else None
        aux: list[Tensor] = []
        kept: dict[int, Tensor] = {}
        pruned: list[Tokens] = []
        for block, count in enumerate(counts, start=1):
            if self.fusion is not None and block == len(counts):
                tokens = self.fusion(tokens, pruned)
            before, tokens = tokens, self.backbone.run(block, tokens, position)
            if count == tokens.num_patches:
                continue
            reducer = cast(Reducer, self.reducers[str(block)])
            attention = self.backbone.cls_attention(block, before, position) if reducer.wants_attention else None
            reduction = reducer(tokens, count, Context(attention, pixels), want_pruned=self.fusion is not None)
            tokens = reduction.kept
            kept[block] = tokens.index
            if reduction.pruned is not None:
                pruned.append(reduction.pruned)
            if reduction.aux is not None:
                aux.append(reduction.aux)
        tokens = self.backbone.norm(tokens)
        return Output(self.backbone.head(tokens), tuple(aux), tokens, kept)

    def deploy(self) -> DeployedViT:
        """The inference form: queries folded to one vector a block, training-only weights gone.

        It shares no memory with this model and is in eval mode; it keeps the same tokens and gives the same logits
        as this model in eval mode.
        """
        reducers = {int(block): cast(Reducer, reducer).deploy() for block, reducer in self.reducers.items()}
        model = PrunedViT(copy.deepcopy(self.backbone), self.schedule, reducers, copy.deepcopy(self.fusion))
        return DeployedViT(model).requires_grad_(False).eval()


class DeployedViT(nn.Module):
    """Images [B, 3, H, W] to logits [B, classes]; compiles to one graph and exports."""

    def __init__(self, model: PrunedViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits

    def detailed(self, images: Tensor) -> Output:
        """The same with tokens and kept indices."""
        return self.model(images)


def prune(
    host: nn.Module,
    schedule: Schedule,
    reducer: str = "cropr",
    fusion: str = "none",
    reducer_options: Mapping[str, Any] | None = None,
    num_outputs: int | None = None,
) -> PrunedViT:
    """Add token pruning to a timm model.

    Args:
        host: a timm ``VisionTransformer`` or ``Eva``; used as it is, not copied.
        schedule: when how many patch tokens go.
        reducer: one of ``cropr.available_reducers()``.
        fusion: ``llf`` or ``none``.
        reducer_options: keyword arguments of the reducer.
        num_outputs: outputs of the auxiliary heads; the host's classes unless given.

    Raises:
        TypeError: a host or block type that has no adapter.
        ValueError: an impossible schedule, an unknown name or option.
    """
    backbone = adapt(host)
    bring_back = fusions.create(fusion)
    sites = schedule.sites(backbone.depth, bring_back is not None)
    if reducer == "none":
        if sites:
            raise ValueError(f"reducer 'none' with a schedule that prunes ({schedule}); use rate 0 or name a reducer")
        return PrunedViT(backbone, schedule, {}, bring_back)
    outputs = num_outputs or getattr(host, "num_classes", 0)
    if not outputs:
        raise ValueError("the host has no classes (num_classes=0): name num_outputs for the auxiliary heads")
    options = dict(reducer_options or {})
    modules = {block: registry.create(reducer, backbone.dim, outputs, **options) for block in sites}
    if any(module.wants_attention for module in modules.values()):
        backbone.verify_cls_attention()
    return PrunedViT(backbone, schedule, modules, bring_back)


def build_model(
    model: ModelSpec, spec: PruneSpec, num_classes: int, image_size: int, pretrained: bool = False
) -> PrunedViT:
    """The model of a training or benchmark spec.

    The last block has no drop path where tokens are pruned (paper, section 4.1; the authors' code).
    """
    host: Any = timm.create_model(
        model.name,
        pretrained=pretrained,
        num_classes=num_classes,
        drop_path_rate=model.drop_path,
        **{"img_size": image_size, **model.args},
    )
    pruned = prune(host, Schedule.from_config(spec.schedule), spec.reducer, spec.fusion, spec.options)
    if pruned.reducers:
        for name, _ in list(host.blocks[-1].named_children()):
            if name.startswith("drop_path"):
                setattr(host.blocks[-1], name, nn.Identity())
    return pruned


def patch_variance(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, h w]: variance of the pixels of every patch, over its area and channels, of images [B, 3, H, W]."""
    size = (images.shape[-2] // grid[0], images.shape[-1] // grid[1])
    return F.unfold(images.float(), size, stride=size).var(dim=1)
