"""Hosts whose blocks attend within windows of the image, a few of them globally: the plain ViT of a detector.

Patch tokens run in window-major order: window after window, raster order inside each. Reducers keep the order of what
they leave, so after pruning a windowed block cuts the survivors into equal chunks of one window's length, without mask
or padding, on fused attention. Without pruning the chunks are the windows themselves. This reading of "windows and
pruned tokens" is ours (docs/detection.md).

EVA-02 has two rotary tables: of a window and of the whole grid. Rotary attention sees differences of positions only, so
the window's coordinates, counted on over the whole image, give the same attention inside a window, and stay meaningful
for a chunk that spans several. Both tables are gathered by original place.

B batch, N patch tokens, W tokens of a window, C channels.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import RotaryEmbeddingCat, build_rotary_pos_embed
from torch import Tensor, nn

from cropr.pruning.backbones.eva import EvaBackbone
from cropr.pruning.backbones.vit import TimmBackbone, ViTBackbone
from cropr.pruning.fusion import Fusion
from cropr.pruning.tokens import Tokens


class WindowedBackbone(TimmBackbone):
    """Windows around an adapter. Made by ``windowed``; arguments and errors are the same."""

    def __init__(self, host: nn.Module, window: int, global_blocks: Iterable[int]) -> None:
        super().__init__(host)
        self.window, self.window_tokens = window, window * window  # patches a side, W
        self.global_blocks = frozenset(global_blocks)
        if self.prefix:
            raise self._refuse(f"{self.prefix} prefix tokens, which belong to no window (build it class_token=False),")
        if window < 1:
            raise ValueError(f"window={window} must be 1 or more patches a side, for example 16")
        if outside := sorted(block for block in self.global_blocks if not 1 <= block <= self.depth):
            raise ValueError(f"global blocks {outside}: blocks count from 1 to {self.depth}")
        if self.depth not in self.global_blocks:
            lack = f"global blocks {sorted(self.global_blocks)} lack the last one, {self.depth}"
            raise ValueError(f"{lack}: tokens that are fused back before it come from all over the image; add it")
        rope = getattr(host, "rope", None)
        # timm before 1.0.31 knows neither other grids nor augmented places.
        plain = getattr(rope, "grid_type", "index") == "index" and not getattr(rope, "aug_active", False)
        if rope is not None and (type(rope) is not RotaryEmbeddingCat or rope.in_pixels or not plain):
            raise self._refuse(f"{type(rope).__name__} with these settings, which has no form within windows,")

    def keys(self, block: int, tokens: int) -> int:
        return tokens if block in self.global_blocks else self.window_tokens

    def verify_counts(self, entering: Sequence[int]) -> None:
        size = self.window_tokens
        for block, count in enumerate(entering, start=1):
            if block not in self.global_blocks and count % size:
                fits = " or ".join(str(fit) for fit in (count // size * size, -(-count // size) * size) if fit)
                where = f"block {block}, which attends in windows of {self.window} x {self.window} = {size}"
                fix = f"keep a multiple of {size}, here {fits} (Schedule.squares, or align={size} for other rules)"
                raise ValueError(f"{count} patch tokens enter {where}: {fix}")

    def embed(self, images: Tensor) -> tuple[Tokens, tuple[Tensor | None, Tensor | None]]:
        """Tokens in window-major order; rotary tables [grid, 2 d], or None, for global and for windowed blocks. Raises
        ValueError for images that do not hold whole windows."""
        height, width = images.shape[-2:]
        down, across = (self.window * edge for edge in self.patch_size)
        if height % down or width % across:
            found = f"images of {height} x {width} px do not hold whole windows of {down} x {across} px"
            raise ValueError(f"{found}: pad them to {-(-height // down) * down} x {-(-width // across) * across}")
        rows, columns = self.grid(images)
        tokens, table = super().embed(images)
        order = window_order(rows, columns, self.window, images.device)
        within = None if table is None else self._window_table(rows, columns)
        return tokens.keep(order.expand(images.shape[0], -1)), (table, within)

    def run(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> Tokens:
        everywhere, within = position
        if block in self.global_blocks:
            return super().run(block, tokens, everywhere, mask)
        size = self.window_tokens
        assert tokens.index is not None
        chunks = Tokens(tokens.x.reshape(-1, size, tokens.x.shape[-1]), tokens.index.reshape(-1, size), prefix=0)
        return tokens.replace(super().run(block, chunks, within).x.reshape(tokens.x.shape))

    def verify_reducer(self, reducer: Any, fusion: Fusion | None = None) -> None:
        if not reducer.leaves_pruned or reducer.reads - {"pixels"} or reducer.place != "after_block":
            name = type(reducer).__name__
            raise self._refuse(f"windows, for {name}, which does more than prune by a score after a block,")
        super().verify_reducer(reducer, fusion)

    def _window_table(self, rows: int, columns: int) -> Tensor:
        """Rotary table of the whole grid with the distance between neighbours that it has inside a window."""
        rope = self.host.rope
        reference = rope.ref_feat_shape
        if reference is not None:
            # The host squeezes any grid onto ``reference`` positions: a window here, the whole image in its own table.
            reference = [reference[0] * rows / self.window, reference[1] * columns / self.window]
        names = ("bands", "dim", "temperature", "grid_offset", "grid_indexing", "rotate_half")
        same = {name: getattr(rope, name) for name in names if hasattr(rope, name)}
        table = build_rotary_pos_embed([rows, columns], in_pixels=False, ref_feat_shape=reference, **same)
        return torch.cat(table, dim=-1)


class WindowedViT(WindowedBackbone, ViTBackbone):
    """timm ``VisionTransformer`` with windows."""


class WindowedEva(WindowedBackbone, EvaBackbone):
    """timm ``Eva`` with windows and both of its rotary tables."""


def windowed(host: nn.Module, window: int, global_blocks: Iterable[int]) -> WindowedBackbone:
    """Windows around a timm model; give the result to ``cropr.prune`` in place of the model.

    Args:
        host: without prefix tokens (``class_token=False``); built with ``dynamic_img_size=True`` it takes images of
            any size that holds whole windows.
        window: patches a side. EVA-02's detectors have 16.
        global_blocks: blocks (from 1) that attend over all tokens; the last must be one. EVA-02-L: 3, 6, ..., 24.

    Raises TypeError for a model, or a feature of it, without adapter, ValueError for a window or blocks out of range.
    """
    adapters: tuple[type[WindowedBackbone], ...] = (WindowedViT, WindowedEva)
    for adapter in adapters:
        if isinstance(host, adapter.host_type):
            return adapter(host, window, global_blocks)
    supported = [f"timm {adapter.host_type.__name__}" for adapter in adapters]
    raise TypeError(f"no windowed adapter for {type(host).__name__}; supported: {supported}")


def window_order(rows: int, columns: int, window: int, device: torch.device | None = None) -> Tensor:
    """[rows columns] int64: raster index of each place, window after window, raster order inside each."""
    raster = torch.arange(rows * columns, device=device)
    tiles = raster.view(rows // window, window, columns // window, window)
    return tiles.transpose(1, 2).flatten()
