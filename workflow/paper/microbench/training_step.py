"""Time and memory of a training step, pruned against unpruned: the trainer's own step on noise."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cropr.bench.device import Unsupported, largest_batch, noise, working_memory
from cropr.bench.models import NUM_CLASSES, build_on_meta, megabytes, random_weights, weights_mb
from cropr.bench.specs import UNPRUNED
from cropr.bench.timing import Tell, against, clock, interleave, speed
from cropr.distributed import World
from cropr.pruning import flops
from cropr.pruning.model import PrunedViT
from cropr.specs import PruneSpec, RecipeSpec
from cropr.tasks.base import autocast
from cropr.tasks.classification import DataSpec
from cropr.tasks.classification.run import Objective
from cropr.training.optim import Stepper, create_optimizer
from workflow.paper.microbench import TrainingSpec


class _Trainee:
    """A model in training, and its measurements."""

    def __init__(self, spec: TrainingSpec, prune: PruneSpec, device: str, batch_size: int) -> None:
        self.model: PrunedViT = build_on_meta(spec.model, prune, spec.image_size)
        self.macs = flops.macs(self.model.deploy()).total
        random_weights(self.model, device, torch.float32)
        recipe = RecipeSpec(batch_size=batch_size, precision=spec.precision)
        objective = Objective(DataSpec(num_classes=NUM_CLASSES, image_size=spec.image_size))
        self.optimizer = create_optimizer(self.model, recipe)
        stepper = Stepper(self.model, objective, self.optimizer, recipe, World(device=torch.device(device)))
        self.images = noise(batch_size, (3, spec.image_size, spec.image_size), device, "fp32")
        self.step = partial(stepper, self.images, torch.arange(batch_size, device=device) % NUM_CLASSES)
        self.precision, self.device = spec.precision, device
        self.memory: dict[str, float] = {}
        self.seconds: list[float] = []

    def warm_up(self) -> None:
        """Two forward passes and two steps; the second of either is measured: the first sets up what stays."""
        deployed = self.model.deploy()

        @torch.inference_mode()
        def infer() -> Tensor:
            with autocast(self.images.device, self.precision):
                return deployed(self.images)

        infer()
        _, forward = working_memory(infer, self.device)
        inference = weights_mb(deployed)
        self.model.train()
        self.step()
        self.optimizer.zero_grad(set_to_none=True)
        _, step = working_memory(self.step, self.device)
        moments = (t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
        self.memory["state_mb"] = weights_mb(self.model) + megabytes(moments)
        if forward is not None and step is not None:
            self.memory["inference_memory_mb"] = inference + forward
            self.memory["training_memory_mb"] = self.memory["state_mb"] + step


def training_cells(spec: TrainingSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """Measure optimizer steps of the unpruned model and of every variant, in turn in every round; arguments and errors
    as of ``microbench.measure.measure``.

    Returns:
        One a variant: ``tokens``, ``seconds`` (round by round) and ``metrics``: ``images_per_s`` of training,
        ``speedup`` over the unpruned model with its interval and its ``mac_ratio`` (of the forward pass, without what
        only training runs), ``state_mb`` (weights and the optimizer's moments), ``training_memory_mb`` (state and the
        peak during a step: activations, gradients) and ``inference_memory_mb`` (the deployed model's weights and the
        peak during its forward pass). Memory is left out where the system keeps no count.
    """
    if spec.precision == "fp16" and not device.startswith("cuda"):
        raise Unsupported("precision fp16: training scales its loss on CUDA only; use fp32 or bf16")
    fitted, trainees = largest_batch(spec.batch_size, partial(_attempt, spec, device, tell))
    base, cells = trainees[UNPRUNED], []
    for trainee in trainees.values():
        found = speed(trainee.seconds, fitted)
        metrics = found | against(base.seconds, trainee.seconds, base.macs / trainee.macs) | trainee.memory
        metrics |= {"batch_size": fitted, "step_ms": 1000 * fitted / found["images_per_s"]}
        cells.append({"tokens": list(trainee.model.token_trace), "seconds": trainee.seconds, "metrics": metrics})
    return cells


def _attempt(spec: TrainingSpec, device: str, tell: Tell, batch_size: int) -> dict[str, _Trainee]:
    """Train all of them a few steps with batches of this size."""
    trainees = {}
    for name, prune in {UNPRUNED: PruneSpec(), **spec.variants}.items():
        tell(f"warm up {name}")
        trainees[name] = _Trainee(spec, prune, device, batch_size)
        trainees[name].warm_up()
    clocks = {name: partial(clock, trainee.step, 1, device) for name, trainee in trainees.items()}
    for name, seconds in interleave(clocks, spec.rounds, tell).items():
        trainees[name].seconds = seconds
    return trainees
