"""The simple feature pyramid of ViTDet: maps of several strides from the last map of a plain ViT.

B batch, C channels of the encoder, D channels of the pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation


class SimpleFeaturePyramid(nn.Module):
    """Each level is resampled from the same map; no top-down path (ViTDet, Li et al., 2022).

    Args:
        dim, channels: C and D.
        stride: pixels between neighbours of the input map: the patch size.
        scales: of the levels against the input map, finest first, each half of the one before, among 4, 2, 1, 0.5;
            ValueError for others.
    """

    def __init__(self, dim: int, channels: int, stride: int, scales: Sequence[float] = (4, 2, 1, 0.5)) -> None:
        super().__init__()
        if not scales or set(scales) - {4, 2, 1, 0.5} or any(a != 2 * b for a, b in pairwise(scales)):
            raise ValueError(f"scales={tuple(scales)}: choose neighbours of 4, 2, 1, 0.5, finest first")
        self.branches = nn.ModuleList(_branch(dim, channels, scale) for scale in scales)
        strides = [int(stride / scale) for scale in scales]
        self.strides = (*strides, 2 * strides[-1])
        """Pixels between neighbours of every level, the last one included that only proposals are read from."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, C, H, W] to a map [B, D, h, w] a level, finest first; one more is the coarsest, subsampled."""
        levels = [branch(x) for branch in self.branches]
        return [*levels, levels[-1][:, :, ::2, ::2]]


def _branch(dim: int, channels: int, scale: float) -> nn.Sequential:
    """Resampling, then a 1 x 1 and a 3 x 3 convolution, each with a LayerNorm over channels."""
    resample: list[nn.Module] = [nn.MaxPool2d(2)] if scale < 1 else []
    if scale > 1:
        resample = [nn.ConvTranspose2d(dim, dim // 2, 2, 2)]
    if scale == 4:
        resample += [LayerNorm2d(dim // 2), nn.GELU(), nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2)]
    width = dim // int(max(scale, 1))
    convolve = {"norm_layer": LayerNorm2d, "activation_layer": None}
    return nn.Sequential(
        nn.Sequential(*resample),
        Conv2dNormActivation(width, channels, 1, **convolve),
        Conv2dNormActivation(channels, channels, 3, **convolve),
    )
