"""What a job is told: typed, frozen, checked. One spec names one result; its digest is the name.

Pure Python and pydantic, no torch: the workflow and the command line read and write these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cropr.schedule import Schedule

_CROPR = (
    "num_queries",
    "num_heads",
    "qkv_proj",
    "norm",
    "mlp",
    "mlp_ratio",
    "selector",
    "stop_gradient",
)

REDUCERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "cropr": _CROPR,
    "non_salient": _CROPR,
    "random": (),
    "variance": (),
    "attn_topk": (),
}
"""Reducers by name, each with the options that it takes: the torch-free twin of ``cropr.reducers``, so that a wrong
name in a YAML file is found before any job starts. A test holds the two equal."""


class Spec(BaseModel):
    """Base of all specs: unknown keys are refused, values are not changed after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def digest(self) -> str:
        """Ten hex digits of the content: equal specs share a digest, on every machine.

        Values that are the default do not enter, so that a new key, off by default, leaves all earlier names alone.
        """
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


class ModelSpec(Spec):
    """A timm model and how it is built."""

    name: str
    """timm model name, for example ``vit_large_patch16_224.mae``."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Passed on to ``timm.create_model``."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth, rising linearly over the blocks. The last block of a pruned model has none."""


class PruneSpec(Spec):
    """What is pruned, when, and how it comes back."""

    reducer: str = "none"
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reducer."""
    schedule: dict[str, Any] = Field(default_factory=lambda: {"constant": {"rate": 0}}, validate_default=True)
    """As ``Schedule.from_config`` reads it."""
    fusion: Literal["none", "llf"] = "none"
    aux_weight: float = Field(1.0, ge=0)
    """Weight of the sum of the auxiliary losses."""

    @field_validator("schedule")
    @classmethod
    def _normalise(cls, value: Mapping[str, Any]) -> dict[str, Any]:
        return Schedule.from_config(value).to_config()

    @model_validator(mode="after")
    def _known(self) -> PruneSpec:
        if self.reducer not in REDUCERS:
            raise ValueError(f"unknown reducer {self.reducer!r}; choose one of {', '.join(REDUCERS)}")
        allowed = REDUCERS[self.reducer]
        if unknown := sorted(set(self.options) - set(allowed)):
            raise ValueError(
                f"reducer {self.reducer!r} has no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}"
            )
        return self


class ScenesSpec(Spec):
    """The embedded data set (see ``cropr.data.scenes``)."""

    image_size: int = Field(64, ge=16)
    """Pixels a side."""
    train: int = Field(20_000, ge=1)
    val: int = Field(2_000, ge=1)
    scale: tuple[float, float] = (3.0, 3.0)
    """Size of the labelled digit, in units of its 8 px original: drawn between these two."""
    distractors: int = Field(8, ge=0)
    """Fragments of digits that are strewn over an image, at most; their number is random."""
    seed: int = 0


class AugmentSpec(Spec):
    """Training transforms; the names are timm's."""

    hflip: float = 0.5
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    auto_augment: str | None = None
    color_jitter: float | None = None
    erasing: float = Field(0.0, ge=0, le=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    smoothing: float = Field(0.0, ge=0, lt=1)


class DataSpec(Spec):
    """What the images are and how they are fed."""

    image_size: int = Field(224, ge=8)
    num_classes: int = Field(1000, ge=2)
    augment: AugmentSpec = AugmentSpec()
    crop_pct: float = Field(0.875, gt=0, le=1)
    """Evaluation: shorter side resized to ``image_size / crop_pct``, then centre crop."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    scenes: ScenesSpec | None = None
    """Which generated set this is; None for a folder of the user's."""


class RecipeSpec(Spec):
    """How it is trained. Defaults are the authors' ImageNet recipe (reference, section 3.1)."""

    epochs: int | float = Field(50, gt=0)
    """Passes over the training images; 0.5 ends after half of them."""
    batch_size: int = Field(1024, ge=1)
    """Images per optimizer step over all devices and accumulated micro-batches."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per optimizer step."""
    base_lr: float = Field(1e-3, gt=0)
    """Peak learning rate for 256 images a step; scaled by ``batch_size / 256``."""
    min_lr: float = Field(1e-6, ge=0)
    warmup_epochs: float = Field(5, ge=0)
    layer_decay: float = Field(0.75, gt=0, le=1)
    query_lr: float = Field(1.0, gt=0)
    """Learning-rate scale of Cropr's queries. They start at unit length, where their attention is almost uniform."""
    weight_decay: float = Field(0.05, ge=0)
    clip_grad: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    """bf16 and fp16 are autocast; fp16 scales the loss on CUDA."""

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up of a parameter with layer scale 1."""
        return self.base_lr * self.batch_size / 256


class TrainSpec(Spec):
    """One training run, without its seed."""

    task: Literal["classification"] = "classification"
    model: ModelSpec
    prune: PruneSpec = PruneSpec()
    data: DataSpec = DataSpec()
    recipe: RecipeSpec = RecipeSpec()
    init: Literal["random", "timm"] | str = "random"
    """Weights to start from: ``random``, ``timm`` (the pretrained tag of the model's name), or the digest of the
    training run that made them."""


class BenchSpec(Spec):
    """One throughput measurement: unpruned and pruned model, interleaved in one process."""

    model: ModelSpec
    prune: PruneSpec
    image_size: int = 224
    pruned_image_size: int | None = None
    """Image size of the second model where it differs: an unpruned model on a smaller image is a rival, too."""
    batch_size: int = Field(4, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Cast of model and images; deployed models run in one dtype."""
    rounds: int = Field(7, ge=3)
    warmup: int = Field(1, ge=1)
