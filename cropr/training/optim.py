"""One optimizer step, as the authors have it (docs/authors_code.md): AdamW with layer decay, rates, clipping.

A model of depth L has L + 2 levels: the stem (patch embedding, positions, prefix tokens) is level 0, block l level l,
all else level L + 1 with scale 1: final norms, head, and what pruning adds for training.
"""

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from cropr.distributed import World
from cropr.pruning.fusion import Fusion
from cropr.pruning.reducers.base import Reducer
from cropr.pruning.schedule import ramp
from cropr.specs import RecipeSpec
from cropr.tasks.base import BatchTask, autocast

HOST = "backbone.host."
"""Prefix of the host model's parameters in a ``PrunedViT``."""
POWERS = {"poly": 0.9, "constant": 0.0}
"""Exponent of a learning rate that falls as (1 - t) ** power; 0.9 is the authors' for segmentation."""
NO_DECAY = frozenset({"pos_embed", "cls_token", "reg_token", "dist_token"})
"""Parameters of the host without weight decay, in addition to what the host names itself and all 1-D ones."""


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Learning-rate scale of every parameter of a ``PrunedViT``: ``decay`` (1 is none) to the power of the levels above
    it. The host says through timm's ``group_matcher`` what its stem is."""
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
    """Groups for the optimizer, with ``lr_scale`` as timm's schedulers read it and the names of their parameters. No
    weight decay for 1-D parameters, positions and prefix tokens; the queries of a Cropr module are decayed."""
    host = model.get_submodule(HOST.rstrip("."))
    named = set(host.no_weight_decay()) if hasattr(host, "no_weight_decay") else set()  # type: ignore[operator]
    exempt = {HOST + name for name in NO_DECAY | named}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    scales = layer_scales(model, recipe.layer_decay)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or name in exempt else recipe.weight_decay
        key = (scales[name] * (recipe.query_lr if name.endswith(".scorer.queries") else 1.0), decay)
        group = groups.setdefault(key, {"lr_scale": key[0], "weight_decay": decay, "params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def freeze_encoder(model: nn.Module) -> None:
    """Train no weight of the host but its classifier. What pruning adds, and a task's own heads, are trained."""
    for name, parameter in model.named_parameters():
        if name.startswith(HOST) and not name.startswith(f"{HOST}head"):
            parameter.requires_grad_(False)


def create_optimizer(model: nn.Module, recipe: RecipeSpec) -> torch.optim.AdamW:
    """AdamW with torch's betas and epsilon, as the authors left them; all tensors of a group in one kernel."""
    return torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.peak_lr, fused=True)


def total_steps(recipe: RecipeSpec, steps_per_epoch: float) -> int:
    """Optimizer steps of the whole run; the last epoch may be a part of one."""
    return max(1, round(recipe.epochs * steps_per_epoch))


def create_schedule(optimizer: torch.optim.Optimizer, recipe: RecipeSpec, steps_per_epoch: float) -> Scheduler:
    """Learning rate of each optimizer step: linear warm-up from its first increment on, then ``recipe.decay`` to
    ``min_lr``. Call ``step_update(step)`` before each step, from 0. Raises ValueError: warm-up takes up all epochs."""
    if recipe.warmup_epochs >= recipe.epochs:
        limit = f"must be less than recipe.epochs = {recipe.epochs:g}"
        raise ValueError(f"spec.recipe.warmup_epochs = {recipe.warmup_epochs:g}: {limit}")
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


def pruning_share(recipe: RecipeSpec, step: int, steps_per_epoch: int) -> Fraction:
    """Share of the schedule in force at an optimizer step, which counts from 0; 1 without a curriculum. It rises with
    each epoch, as the authors' segmentation does: R_e = floor(R e / (E / 2 - 1)) tokens a module in epoch e of E, and R
    from the middle on. Runs of part epochs or less than three, for which the formula has no ramp, rise with each step
    instead. Evaluation always prunes by the whole schedule."""
    if not recipe.curriculum:
        return Fraction(1)
    if recipe.epochs >= 3 and recipe.epochs == int(recipe.epochs):
        return ramp(step // steps_per_epoch, int(recipe.epochs))
    return ramp(step, total_steps(recipe, steps_per_epoch))


@dataclass(frozen=True, slots=True)
class StepResult:
    """Numbers of one step, over all processes: the main loss, the mean auxiliary loss (None without Cropr modules), the
    gradient norm of encoder and head before clipping, whether a process was asked to stop, images of the step."""

    loss: float
    aux_loss: float | None
    grad_norm: float
    stop: bool
    images: int


class Stepper:
    """One optimizer step: forward, backward over micro-batches, clipping, update. Gradients of the encoder and of what
    pruning adds for training are clipped apart, so that the auxiliary losses do not reach the encoder that way."""

    def __init__(
        self, model: nn.Module, task: BatchTask, optimizer: torch.optim.Optimizer, recipe: RecipeSpec, world: World
    ) -> None:
        self.model, self.task, self.optimizer, self.recipe, self.world = model, task, optimizer, recipe, world
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "fp16")
        self.overflows = 0
        # In steps that prune nothing, such as the first of a curriculum, a fusion has no part, nor has a reducer unless
        # it learns from what it keeps.
        idle = (m for m in model.modules() if isinstance(m, Fusion) or (isinstance(m, Reducer) and not m.learns))
        self._wrapped = world.wrap(model, idle=any(True for module in idle for _ in module.parameters()))
        named = list(model.named_parameters())
        self._reducers = [p for name, p in named if name.startswith("reducers.") and p.requires_grad]
        self._encoder = [p for name, p in named if not name.startswith("reducers.") and p.requires_grad]

    def __call__(self, images: Tensor, targets: Any, stop: Callable[[], bool] = lambda: False) -> StepResult:
        """Update the weights with one batch: images [B, 3, H, W], the task's targets. Waits for the device once.
        ``stop`` says whether this process was asked to stop; the result, whether any was."""
        device, world = self.world.device, self.world
        images, targets = images.to(device, non_blocking=True), self.task.move(targets, device)
        images, targets = self.task.prepare(images, targets)
        self.optimizer.zero_grad(set_to_none=True)
        sums = self._backward(images, targets)
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.recipe.clip_grad is None else self.recipe.clip_grad
        norm = clip_grad_norm_(self._encoder, limit)
        if self._reducers:
            clip_grad_norm_(self._reducers, limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Losses, the request to stop and the norm in one transfer from the device.
        sums = world.sum(torch.cat((sums, sums.new_tensor([stop(), len(images)]))))
        loss, aux, wish, count, grad_norm = torch.cat((sums, norm.reshape(1).to(sums))).tolist()
        self.overflows = 0 if math.isfinite(grad_norm) else self.overflows + 1
        aux_loss = aux / world.size if self._reducers else None
        return StepResult(loss / world.size, aux_loss, grad_norm, wish > 0, int(count))

    def _backward(self, images: Tensor, targets: Any) -> Tensor:
        """Gradients of the mean over the batch, in micro-batches; [2]: main loss and mean auxiliary loss."""
        count = self.recipe.accumulate
        pairs = zip(images.tensor_split(count), self.task.split(targets, count), strict=True)
        parts = [(x, y) for x, y in pairs if len(x)]
        sums = torch.zeros(2, device=images.device)
        for number, (x, y) in enumerate(parts, start=1):
            last = number == len(parts)
            # Processes average their gradients once a step, with the last part.
            quiet = nullcontext() if last or self.world.size == 1 else self._wrapped.no_sync()  # type: ignore[operator]
            with quiet:
                with autocast(self.world.device, self.recipe.precision):
                    output = self.task.forward(self._wrapped, x, y)
                losses = self.task.loss(output, y)
                share, aux = len(x) / len(images), losses.aux.detach()
                self.scaler.scale(losses.total * share).backward()
            sums += share * torch.stack((losses.main.detach(), aux.mean() if aux.numel() else aux.new_zeros(())))
        return sums


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's and NumPy's global generators for one step; timm's mixup draws from NumPy's."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(2)
    torch.manual_seed(int(state[0]))
    np.random.seed(int(state[1]))
