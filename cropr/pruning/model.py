"""The pruned Vision Transformer: a host's blocks, reducers between them, a fusion before the last.

B batch, P prefix tokens, N patch tokens, K kept, C channels, Q queries. Blocks count from 1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cropr.pruning.backbones.base import Backbone, adapt
from cropr.pruning.fusion import Fusion
from cropr.pruning.methods import FUSIONS, REDUCERS, Place, before_last_block, choose
from cropr.pruning.reducers.base import Context, Reducer, Reduction, create
from cropr.pruning.schedule import Schedule, attended, trace
from cropr.pruning.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Output:
    """Result of a forward pass."""

    logits: Tensor
    """[B, classes]; [B, classes, H, W] of a segmenter."""
    aux: tuple[Tensor, ...]
    """Auxiliary predictions [B, Q, outputs], one a Cropr module, in training mode; else empty."""
    tokens: Tokens
    """After the last norm. ``tokens.raster()`` sorts them by place."""
    kept: dict[int, Tensor]
    """Block -> raster indices [B, K] of the patches alive after its reducer, or of the centres of merged ones; padding
    repeats an index. Blocks whose tokens have no place are left out."""
    grid: tuple[int, int]
    """Rows and columns of the patch grid."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Further losses of the reducers by name, in training mode: weighted scalars, means over the reducers."""

    @property
    def extra_loss(self) -> Tensor | float:
        """Sum of ``losses``."""
        return sum(self.losses.values())

    def pruned_after(self, num_patches: int) -> Tensor:
        """[B, num_patches] int64: block after which each patch was pruned, or went into the token of another patch;
        0 for never. Raises ValueError for methods that mix all patches into slots."""
        if not self.kept and self.tokens.index is None:
            raise ValueError("this method mixes all patches into slots without a place: there is no pruning map")
        after = self.logits.new_zeros(len(self.logits), num_patches, dtype=torch.int64)
        alive = torch.ones_like(after, dtype=torch.bool)
        for block, index in self.kept.items():
            stays = torch.zeros_like(alive).scatter(1, index, True)
            after[alive & ~stays] = block
            alive = alive & stays
        return after


class PrunedViT(nn.Module):
    """A host with token pruning. Made by ``prune``; ``deploy`` gives its inference form.

    ``reducers`` maps a block to the reducer that follows it; without ``fusion``, tokens are pruned for good. Raises
    ValueError for a schedule or a fusion that does not suit this model, TypeError for what the host cannot do.
    """

    dense: ClassVar[bool] = False
    """One prediction a patch instead of one an image."""

    def __init__(
        self, backbone: Backbone, schedule: Schedule, reducers: Mapping[int, Reducer], fusion: Fusion | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.schedule = schedule
        self.reducers = nn.ModuleDict({str(block): reducer for block, reducer in reducers.items()})
        self.fusion = fusion
        self._verify(next(iter(reducers.values()), None))
        self._wants_pixels = any("pixels" in reducer.reads for reducer in reducers.values())
        self._fixed = any(reducer.slots for reducer in reducers.values())
        self._share: Fraction | None = None
        self._counts: dict[tuple[int, Fraction | None], tuple[int, ...]] = {}
        self.counts(backbone.num_patches)

    @classmethod
    def default_options(cls, reducer: str, backbone: Backbone) -> dict[str, Any]:
        """Options of the reducer that suit this kind of model, where none are given."""
        return {}

    @property
    def fuses_early(self) -> bool:
        """Pruned tokens come back before the last block, which then computes on all."""
        return self.fusion is not None and self.fusion.place == "before_last_block"

    def counts(self, num_patches: int, share: Fraction | None = None) -> tuple[int, ...]:
        """Patch tokens alive after each block, for an image of so many patches; by default by the whole schedule."""
        if (num_patches, share) not in self._counts:
            fused, force = self.fuses_early, Fraction(1) if share is None else share
            found = self.schedule.resolve(num_patches, self.backbone.depth, fused, self.backbone.prefix, force)
            self.backbone.verify_counts(attended(found, num_patches, fused))
            self._counts[num_patches, share] = found
        return self._counts[num_patches, share]

    def ramp(self, share: Fraction) -> None:
        """Let this share of the schedule be in force in training mode, from now on (see ``schedule.ramp``). Evaluation
        and slots use the whole schedule. At share 0 nothing is pruned, and what learns to score learns already."""
        self._share = share if share < 1 else None

    @property
    def token_trace(self) -> tuple[int, ...]:
        """Tokens with prefix at the input and after every block (197, 188, 180, ...); no fusion after the last."""
        patches = self.backbone.num_patches
        return trace(self.counts(patches), patches, self.backbone.prefix)

    def forward(self, images: Tensor) -> Output:
        """Images [B, 3, H, W], normalised, to an ``Output``."""
        tokens, position = self.backbone.embed(images)
        *counts, _ = self.counts(tokens.num_patches, self._share if self.training and not self._fixed else None)
        grid = self.backbone.grid(images)
        pixels = patch_variance(images, grid) if self._wants_pixels else None
        kept: dict[int, Tensor] = {}
        pruned: dict[int, Tokens] = {}
        aux: list[Tensor] = []
        losses: dict[str, list[Tensor]] = {}
        for block, count in enumerate(counts, start=1):
            reducer = self._active(block, tokens.num_patches, count)
            if reducer is None:
                tokens = self.backbone.run(block, tokens, position)
                continue
            reduction = self._reduce(reducer, block, count, tokens, position, pixels)
            tokens = reduction.kept
            if tokens.index is not None:
                kept[block] = tokens.index
            if reduction.pruned is not None:
                pruned[block] = reduction.pruned
            if reduction.aux is not None:
                aux.append(reduction.aux)
            for name, loss in reduction.losses.items():
                losses.setdefault(name, []).append(loss)
        fused = self._fuse("before_last_block", tokens, pruned)
        mask = None if self.fusion is None else self.fusion.mask(tokens, fused)
        tokens = self.backbone.run(self.backbone.depth, fused, position, mask)
        tokens = self.backbone.norm(self._fuse("after_last_block", tokens, pruned))
        logits = self._predict(images, tokens, pruned)
        means = {name: torch.stack(each).mean() for name, each in losses.items()}
        return Output(logits, tuple(aux), tokens, kept, grid, means)

    def _active(self, block: int, patches: int, count: int) -> Reducer | None:
        """The reducer of a block, if it has something to do."""
        if str(block) not in self.reducers:
            return None
        reducer = cast(Reducer, self.reducers[str(block)])
        idle = count == patches and not reducer.slots and not (reducer.learns and self.training)
        return None if idle else reducer

    def _reduce(
        self, reducer: Reducer, block: int, count: int, before: Tokens, position: Any, pixels: Tensor | None
    ) -> Reduction:
        """Run a block with its reducer."""
        backbone, half = self.backbone, reducer.place == "after_attention"
        tokens = (backbone.attend if half else backbone.run)(block, before, position)
        found = {name: getattr(backbone, name)(block, before, position) for name in reducer.reads - {"pixels"}}
        context = Context(**found, pixels=pixels if "pixels" in reducer.reads else None)
        reduction = reducer(tokens, count, context, want_pruned=self.fusion is not None)
        return replace(reduction, kept=backbone.mlp(block, reduction.kept)) if half else reduction

    def _verify(self, reducer: Reducer | None) -> None:
        """Refuse what this model, its fusion or its host cannot do with the reducers: ValueError or TypeError."""
        name, back = type(reducer).__name__, type(self.fusion).__name__
        if self.fusion is not None and self.fusion.place == "after_head" and not self.dense:
            problem = f"{back} fuses predictions per patch, and this model makes one an image"
            raise ValueError(f"{problem}; choose another fusion, such as 'llf'")
        if reducer is None:
            return
        if self.fusion is not None and not reducer.leaves_pruned:
            raise ValueError(f"{name} leaves no pruned tokens behind that {back} could bring back; use fusion 'none'")
        if self.dense and reducer.slots:
            problem = "mixes all patches into slots without a place, and this model makes a prediction per patch"
            raise ValueError(f"{name} {problem}; use a method that prunes or merges")
        self.backbone.verify_reducer(reducer, self.fusion)

    def _predict(self, images: Tensor, tokens: Tokens, pruned: Mapping[int, Tokens]) -> Tensor:
        """Logits from tokens after the last norm; ``pruned`` are those set aside, by block."""
        return self.backbone.head(tokens)

    def _fuse(self, place: Place, tokens: Tokens, pruned: Mapping[int, Tokens]) -> Tokens:
        """What the fusion makes of the tokens, if this is its place."""
        return tokens if self.fusion is None or self.fusion.place != place else self.fusion(tokens, pruned)

    def deploy(self) -> DeployedViT:
        """The inference form, in eval mode: queries folded to one vector a block, training-only weights gone. It shares
        no memory with this model, keeps the same tokens and gives the same logits."""
        return DeployedViT(type(self)(*self._inference_parts())).requires_grad_(False).eval()

    def _inference_parts(self) -> tuple[Backbone, Schedule, dict[int, Reducer], Fusion | None]:
        """Arguments for the constructor that make the inference form."""
        reducers = {int(block): cast(Reducer, reducer).deploy() for block, reducer in self.reducers.items()}
        return copy.deepcopy(self.backbone), self.schedule, reducers, copy.deepcopy(self.fusion)


class DeployedViT(nn.Module):
    """Images [B, 3, H, W] to logits, as of ``Output``; compiles to one graph and exports."""

    def __init__(self, model: PrunedViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits

    def detailed(self, images: Tensor) -> Output:
        """The same with tokens and kept indices."""
        return self.model(images)


Model = TypeVar("Model", bound=PrunedViT)


def prune(
    host: nn.Module,
    schedule: Schedule,
    reducer: str = "cropr",
    fusion: str = "none",
    reducer_options: Mapping[str, Any] | None = None,
    num_outputs: int | None = None,
    kind: type[Model] = PrunedViT,  # type: ignore[assignment]
) -> Model:
    """Add token pruning to a Vision Transformer of a host library.

    Args:
        host: a model that has an adapter (docs/hosts.md), or an adapter, as ``windowed`` makes one; it is not copied.
        schedule: how many patch tokens are pruned after each block.
        reducer: a name of ``cropr.pruning.methods.REDUCERS``.
        fusion: a name of ``FUSIONS`` there.
        reducer_options: keyword arguments of the reducer, over those of ``kind``.
        num_outputs: outputs of the auxiliary heads; the host's classes unless given.
        kind: what to make: a model for images, or a task's own, such as a segmenter.

    Raises TypeError for a host or block type without adapter and for a name instead of a model, ValueError for an
    impossible schedule and for an unknown name or option.
    """
    if isinstance(host, str):
        raise TypeError(f"host = {host!r}: give the model itself, as timm.create_model or from_pretrained returns it")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule = {schedule!r}: give a Schedule, such as cropr.Schedule.constant(rate=8)")
    backbone = host if isinstance(host, Backbone) else adapt(host)
    method, fused = choose(FUSIONS, "fusion", fusion), before_last_block(fusion)
    sites = schedule.sites(backbone.depth, fused)
    outputs: int = num_outputs or backbone.num_classes
    bring_back = method.load()(backbone.dim, outputs, sites) if method.path else None
    if reducer == "none":
        if sites:
            raise ValueError(f"reducer 'none' with a schedule that prunes ({schedule}); use rate 0 or name a reducer")
        return kind(backbone, schedule, {}, bring_back)
    if not outputs and "num_queries" in REDUCERS[reducer].options:
        raise ValueError("the host has no classes: name num_outputs for the auxiliary heads")
    options = {**kind.default_options(reducer, backbone), **(reducer_options or {})}
    counts = schedule.resolve(backbone.num_patches, backbone.depth, fused, backbone.prefix)
    modules = {
        block: create(reducer, backbone.dim, outputs, keep=counts[block - 1], depth=block / backbone.depth, **options)
        for block in sites
    }
    return kind(backbone, schedule, modules, bring_back)


def patch_variance(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, h w]: variance of the pixels of every patch, over its area and channels, of images [B, 3, H, W]."""
    size = (images.shape[-2] // grid[0], images.shape[-1] // grid[1])
    return F.unfold(images.float(), size, stride=size).var(dim=1)
