"""Time and memory of a training step, pruned against unpruned: the trainer's own step on noise."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cropr.bench.device import Unsupported, check, largest_batch, noise, working_memory
from cropr.bench.models import NUM_CLASSES, build_on_meta, megabytes, random_weights, weights_mb
from cropr.bench.specs import UNPRUNED, TrainingSpec
from cropr.bench.timing import Tell, against, clock, interleave, speed
from cropr.pruning import flops
from cropr.pruning.model import PrunedViT
from cropr.specs import PruneSpec, RecipeSpec
from cropr.tasks.base import autocast
from cropr.tasks.classification import DataSpec
from cropr.tasks.classification.run import Objective
from cropr.training.distributed import World
from cropr.training.optim import Stepper, create_optimizer


def training_cells(spec: TrainingSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """Measure optimizer steps of the unpruned model and of every variant, in turn in every round; arguments and errors
    as of ``cropr.bench.microbench.measure``.

    Returns:
        One a variant: ``tokens``, ``seconds`` (round by round) and ``metrics``: ``images_per_s`` of training,
        ``speedup`` over the unpruned model with its interval and its ``mac_ratio`` (of the forward pass, without what
        only training runs), ``state_mb`` (weights and the optimizer's moments), ``training_memory_mb`` (state and the
        peak during a step: activations, gradients) and ``inference_memory_mb`` (the deployed model's weights and the
        peak during its forward pass). Memory is left out where the system keeps no count.
    """
    check(spec.precision, device)
    if spec.precision == "fp16" and not device.startswith("cuda"):
        raise Unsupported("precision fp16: training scales its loss on CUDA only; use fp32 or bf16")
    fitted, trainees = largest_batch(spec.batch_size, partial(_attempt, spec, device, tell))
    base = trainees[UNPRUNED]
    return [
        {
            "tokens": list(trainee.model.token_trace),
            "seconds": trainee.seconds,
            "metrics": {
                **(found := speed(trainee.seconds, fitted)),
                **against(base.seconds, trainee.seconds, base.macs / trainee.macs),
                **trainee.memory,
                "batch_size": fitted,
                "step_ms": 1000 * fitted / found["images_per_s"],
            },
        }
        for trainee in trainees.values()
    ]


class _Trainee:
    """A model in training, and its measurements."""

    def __init__(self, spec: TrainingSpec, prune: PruneSpec, device: str, batch_size: int) -> None:
        self.model: PrunedViT = build_on_meta(spec.model, prune, spec.image_size)
        self.macs = flops.macs(self.model.deploy()).total
        random_weights(self.model, device, torch.float32)
        recipe = RecipeSpec(batch_size=batch_size, precision=spec.precision)
        objective = Objective(DataSpec(num_classes=NUM_CLASSES, image_size=spec.image_size))
        self.optimizer = create_optimizer(self.model, recipe)
        world = World(device=torch.device(device))
        self._step = Stepper(self.model, objective, self.optimizer, recipe, world)
        self._images = noise(batch_size, (3, spec.image_size, spec.image_size), device, torch.float32)
        self._labels = torch.arange(batch_size, device=device) % NUM_CLASSES
        self._precision = spec.precision
        self.memory: dict[str, float] = {}
        self.seconds: list[float] = []

    def step(self) -> None:
        """One step of the optimizer."""
        self._step(self._images, self._labels)

    @torch.inference_mode()
    def inference_memory(self, device: str) -> float | None:
        """MB of the deployed model's weights and of its second forward pass."""
        deployed = self.model.deploy()

        def infer() -> Tensor:
            with autocast(self._images.device, self._precision):
                return deployed(self._images)

        infer()
        _, forward = working_memory(infer, device)
        return None if forward is None else weights_mb(deployed) + forward

    def warm_up(self, device: str) -> None:
        """The first step, which makes the optimizer's state, and a second one whose memory is measured."""
        inference = self.inference_memory(device)
        self.model.train()
        self.step()
        self.optimizer.zero_grad(set_to_none=True)
        _, step = working_memory(self.step, device)
        moments = (t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
        self.memory["state_mb"] = weights_mb(self.model) + megabytes(moments)
        if inference is not None and step is not None:
            self.memory["inference_memory_mb"] = inference
            self.memory["training_memory_mb"] = self.memory["state_mb"] + step


def _attempt(spec: TrainingSpec, device: str, tell: Tell, batch_size: int) -> dict[str, _Trainee]:
    """Train all of them a few steps with batches of this size."""
    trainees = {}
    for name, prune in {UNPRUNED: PruneSpec(), **spec.variants}.items():
        tell(f"warm up {name}")
        trainees[name] = _Trainee(spec, prune, device, batch_size)
        trainees[name].warm_up(device)
    clocks = {name: partial(clock, trainee.step, 1, device) for name, trainee in trainees.items()}
    for name, seconds in interleave(clocks, spec.rounds, tell).items():
        trainees[name].seconds = seconds
    return trainees
