"""The moving average of a model's weights, where a recipe asks for it: it is what is evaluated and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from timm.utils import ModelEmaV3
from torch import nn


class Average:
    """Parameters and buffers averaged over steps: average <- decay average + (1 - decay) weights (timm).

    It starts from the initial weights and has no warm-up: of these, decay^steps are left. After 1000 steps at 0.9999
    that is 90 %, so the decay has to suit the length of a run that starts from random weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._ema = ModelEmaV3(model, decay=decay)

    @property
    def module(self) -> nn.Module:
        """A model of its own with the averaged weights."""
        return self._ema.module

    def update(self, model: nn.Module) -> None:
        """After a step."""
        self._ema.update(model)

    def hand_over(self, model: nn.Module) -> None:
        """Give ``model`` the averaged weights."""
        model.load_state_dict(self.module.state_dict())

    @contextmanager
    def lent(self, model: nn.Module) -> Iterator[None]:
        """Within, ``model`` has the averaged weights; afterwards its own again, bit for bit."""
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.hand_over(model)
        try:
            yield
        finally:
            model.load_state_dict(own)
