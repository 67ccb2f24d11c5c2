"""A pruned Hugging Face model as a model of its own class."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

from torch import Tensor


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
    if not hasattr(backbone, "body"):
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
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    model = getattr(self.pruned, "model", self.pruned)
    tokens = model(pixel_values).tokens
    tokens = tokens if model.fusion is None else tokens.raster()
    states = (tokens.x,) if output_hidden_states else None
    found = BaseModelOutputWithPooling(tokens.x, model.backbone._pooled(tokens), hidden_states=states)
    return found.to_tuple() if return_dict is False else found
