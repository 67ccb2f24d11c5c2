"""AdamW with layer decay, and the learning rate of every step (reference recipe, section 3.1).

A model of depth L has L + 2 levels: the stem (patch embedding, positions, prefix tokens) is level 0, block l level l,
all else level L + 1 with scale 1: final norms, head, and what pruning adds for training.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from cropr.specs import RecipeSpec

HOST = "backbone.host."
"""Prefix of the host model's parameters in a ``PrunedViT``."""

QUERIES = ".scorer.queries"
"""Suffix of the learned queries below ``reducers``."""

POWERS = {"poly": 0.9, "constant": 0.0}
"""Exponent of a learning rate that falls as (1 - t) ** power; 0.9 is the authors' for segmentation."""

NO_DECAY = frozenset({"pos_embed", "cls_token", "reg_token", "dist_token"})
"""Parameters of the host without weight decay, in addition to what the host names itself and all 1-D ones."""


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Learning-rate scale of every parameter: ``decay`` to the power of the levels above it.

    Args:
        model: a ``PrunedViT``, whose host says through timm's ``group_matcher`` what its stem is.
        decay: between 0 and 1; 1 is no layer decay.
    """
    host = model.get_submodule(HOST.rstrip("."))
    stem = re.compile(host.group_matcher(coarse=False)["stem"])  # type: ignore[operator]
    depth = len(host.blocks)  # type: ignore[arg-type]

    def level(name: str) -> int:
        inner = name.removeprefix(HOST)
        if inner == name:
            return depth + 1
        if block := re.match(r"blocks\.(\d+)\.", inner):
            return int(block[1]) + 1
        return 0 if stem.match(inner) else depth + 1

    return {name: decay ** (depth + 1 - level(name)) for name, _ in model.named_parameters()}


def parameter_groups(model: nn.Module, recipe: RecipeSpec) -> list[dict[str, Any]]:
    """Groups for the optimizer, with ``lr_scale`` as timm's schedulers read it and the names of their parameters.

    No weight decay for 1-D parameters, positions and prefix tokens; the queries of a Cropr module are decayed.
    """
    host = model.get_submodule(HOST.rstrip("."))
    named = set(host.no_weight_decay()) if hasattr(host, "no_weight_decay") else set()  # type: ignore[operator]
    exempt = {HOST + name for name in NO_DECAY | named}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    scales = layer_scales(model, recipe.layer_decay)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or name in exempt else recipe.weight_decay
        key = (scales[name] * (recipe.query_lr if name.endswith(QUERIES) else 1.0), decay)
        group = groups.setdefault(key, {"lr_scale": key[0], "weight_decay": decay, "params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def create_optimizer(model: nn.Module, recipe: RecipeSpec) -> torch.optim.AdamW:
    """AdamW with torch's betas and epsilon, as the authors left them; all tensors of a group in one kernel."""
    groups = parameter_groups(model, recipe)
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, fused=True)


def total_steps(recipe: RecipeSpec, steps_per_epoch: float) -> int:
    """Optimizer steps of the whole run; the last epoch may be a part of one."""
    return max(1, round(recipe.epochs * steps_per_epoch))


def create_schedule(optimizer: torch.optim.Optimizer, recipe: RecipeSpec, steps_per_epoch: float) -> Scheduler:
    """Learning rate of each optimizer step: linear warm-up, then ``recipe.decay`` to ``min_lr``.

    Call ``step_update(step)`` before step 0, 1, ...: the scheduler holds no state of its own. Warm-up starts at its
    first increment, not at zero, so that no step is without effect.

    Raises:
        ValueError: warm-up takes up all epochs.
    """
    if recipe.warmup_epochs >= recipe.epochs:
        raise ValueError(
            f"spec.recipe.warmup_epochs = {recipe.warmup_epochs:g}: must be less than recipe.epochs = {recipe.epochs:g}"
        )
    total = total_steps(recipe, steps_per_epoch)
    warmup = min(int(recipe.warmup_epochs * steps_per_epoch), total - 1)
    shape: dict[str, Any] = {
        "t_initial": total - warmup,
        "lr_min": recipe.min_lr,
        "warmup_t": warmup,
        "warmup_lr_init": recipe.peak_lr / warmup if warmup else 0.0,
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if recipe.decay == "cosine":
        return CosineLRScheduler(optimizer, **shape)
    return PolyLRScheduler(optimizer, power=POWERS[recipe.decay], **shape)
