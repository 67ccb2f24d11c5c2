"""From the specifications of a host and of its pruning to a model. The core itself knows no specifications."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from cropr.pruning.model import Model, PrunedViT, prune
from cropr.pruning.schedule import Schedule
from cropr.specs import ModelSpec, PruneSpec


def build_model(
    model: ModelSpec,
    spec: PruneSpec,
    num_classes: int,
    image_size: int,
    pretrained: bool = False,
    kind: type[Model] = PrunedViT,  # type: ignore[assignment]
) -> Model:
    """The model of a training or benchmark spec; ``kind`` as of ``prune``.

    The last block has no drop path where tokens are pruned (paper, section 4.1; the authors' code); in dense models,
    it never has (the authors' code).
    """
    host: Any = timm.create_model(
        model.name,
        pretrained=pretrained,
        num_classes=num_classes,
        drop_path_rate=model.drop_path,
        **{"img_size": image_size, **model.args},
    )
    schedule = Schedule.from_config(spec.schedule)
    pruned = prune(host, schedule, spec.reducer, spec.fusion, spec.options, kind=kind)
    if pruned.reducers or pruned.dense:
        for name, _ in list(host.blocks[-1].named_children()):
            if name.startswith("drop_path"):
                setattr(host.blocks[-1], name, nn.Identity())
    return pruned


def require_known(name: str) -> str:
    """The name of a model, if timm has it.

    Raises:
        ValueError: it does not; with models of similar names.
    """
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0].split('_patch')[0]}*")[:8]
        raise ValueError(f"timm has no model {name!r}; close to it: {', '.join(close) or 'none'}")
    return name
