"""What brings pruned tokens back before the last block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cropr.tokens import Tokens


class LastLayerFusion(nn.Module):
    """Last Layer Fusion (paper, section 3): pruned tokens re-enter in the state they had when pruned.

    The last block attends over all of them; it has no parameters of its own. Order does not matter to attention, so
    pruned tokens are appended; ``Tokens.raster`` restores the grid where a task needs it.
    """

    def forward(self, alive: Tokens, pruned: Sequence[Tokens]) -> Tokens:
        """All patch tokens again, survivors first."""
        return alive.append(pruned)


_FUSIONS: dict[str, type[nn.Module] | None] = {"none": None, "llf": LastLayerFusion}


def create(name: str) -> nn.Module | None:
    """Make a fusion by name; None prunes for good.

    Raises:
        ValueError: unknown name, with the known ones.
    """
    if name not in _FUSIONS:
        raise ValueError(f"unknown fusion {name!r}; choose one of {sorted(_FUSIONS)}")
    kind = _FUSIONS[name]
    return None if kind is None else kind()
