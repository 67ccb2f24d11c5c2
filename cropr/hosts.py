"""What users of a host library do with a pruned model: use it in the host's place, and time it."""

import copy
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def as_host(model: Any) -> Any:
    """A model of the host's own class around a ``PrunedViT`` or ``DeployedViT`` with a Hugging Face host: for pipelines
    and models that contain the host. Weights are shared, not copied.

    It takes ``pixel_values`` and gives the output of the host's class; ``last_hidden_state`` holds the tokens alive, in
    raster order, and of ``hidden_states`` there is the last alone. Raises TypeError: a model around another host.
    """
    backbone: Any = getattr(getattr(model, "model", model), "backbone", None)
    if not hasattr(backbone, "body"):
        kind = type(getattr(backbone, "host", model)).__name__
        raise TypeError(f"as_host takes pruned models of Hugging Face, not {kind}")
    body = copy.copy(backbone.body)
    body._modules, body._parameters, body._buffers = {"pruned": model}, {}, {}
    body.forward = MethodType(_forward, body)
    if backbone.body is backbone.host:
        return body
    host = copy.copy(backbone.host)
    host._modules = {**host._modules, backbone._body: body}
    return host


def _forward(
    self: Any, pixel_values: Tensor, return_dict: bool | None = None, output_hidden_states: bool = False, **others: Any
) -> Any:
    """Forward of the bare model that ``as_host`` makes."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    others.pop("num_items_in_batch", None)  # of transformers' Trainer, for its loss
    if unknown := [name for name, value in others.items() if value is not None and value is not False]:
        raise TypeError(f"a pruned model takes pixel_values, return_dict and output_hidden_states, not {unknown}")
    model = getattr(self.pruned, "model", self.pruned)
    tokens = model(pixel_values).tokens
    tokens = tokens if tokens.index is None else tokens.raster()
    states = (tokens.x,) if output_hidden_states else None
    found = BaseModelOutputWithPooling(tokens.x, model.backbone._pooled(tokens), hidden_states=states)
    return found.to_tuple() if return_dict is False else found


def speedup(base: nn.Module, model: nn.Module, images: Tensor, rounds: int = 20) -> dict[str, float]:
    """How many times faster ``model``, a ``DeployedViT``, is than ``base``, its host in eval mode, on the device of the
    images [B, 3, H, W], whose size is that of the host. Both run in every round, in random order.

    Returns ``speedup``, the median over rounds, with its 95 % interval ``speedup_low`` to ``speedup_high``, and
    ``mac_ratio``, how many times fewer multiply-adds an image takes.
    """
    from cropr.bench.timing import against, time_passes
    from cropr.pruning.flops import macs

    with torch.inference_mode():
        seconds = time_passes({part: partial(part, images) for part in (base, model)}, rounds, images.device.type)
    return against(seconds[base], seconds[model], macs(base).total / macs(model).total)
