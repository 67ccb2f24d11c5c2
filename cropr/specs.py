"""What a job is told: typed, frozen, checked. One spec names one result; its digest is the name.

Pure Python and pydantic, no torch: the workflow and the command line read and write these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from cropr.pruning.schedule import Fusion, Schedule

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
"""Reducers by name, each with the options that it takes: the torch-free twin of ``cropr.pruning.reducers``, so that a wrong
name in a YAML file is found before any job starts. A test holds the two equal."""


Task = Literal["classification", "segmentation", "detection"]


def _increasing(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError("the range must be positive and increasing, such as 0.5, 2")
    return value


Range = Annotated[tuple[float, float], AfterValidator(_increasing)]


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


class DetModelSpec(Spec):
    """Windows of the encoder, pyramid and heads of a detector; defaults are those of EVA-02-L at 1536 px."""

    window: int = Field(16, ge=1)
    """Patches a side of the windows that blocks attend in."""
    global_blocks: tuple[int, ...] = (3, 6, 9, 12, 15, 18, 21, 24)
    """Blocks (from 1) that attend over all tokens; the last must be one."""
    scales: tuple[float, ...] = (4, 2, 1, 0.5)
    """Levels of the pyramid against the encoder's map; proposals have one more, the coarsest halved."""
    channels: int = Field(256, ge=8)
    """Of the pyramid and of the convolutions in the heads."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Square root of the area of the anchors of each level, in pixels."""
    rpn_samples: int = Field(256, ge=2)
    """Anchors an image that proposals are trained on, half of them on objects at most."""
    proposals_train: tuple[int, int] = (2000, 1000)
    """Proposals of a level before suppression, and of an image after it."""
    proposals_test: tuple[int, int] = (1000, 1000)
    canonical_size: int = Field(224, ge=1)
    """A region of this many pixels a side is pooled from the level of stride ``canonical_stride``."""
    canonical_stride: int = Field(16, ge=1)
    stages: tuple[float, ...] = Field((0.5, 0.6, 0.7), min_length=1)
    """Overlap from which a region counts as an object, a stage each. ``(0.5,)`` is Mask R-CNN, the lighter choice."""
    rois: int = Field(512, ge=4)
    """Regions an image that the heads are trained on, a quarter of them on objects at most."""
    box_convs: int = Field(4, ge=0)
    box_width: int = Field(1024, ge=1)
    """Of the linear layer after the convolutions."""
    mask_convs: int = Field(4, ge=0)
    nms: Literal["soft", "plain"] = "soft"
    nms_threshold: float = Field(0.6, gt=0, le=1)
    """Overlap from which scores are lowered (soft, linearly) or boxes dropped (plain)."""
    min_score: float = Field(0.001, ge=0, lt=1)
    max_detections: int = Field(100, ge=1)
    maskness: bool = False
    """Mask AP ranks by score times the mask's mean probability inside it, as EVA-02's published mask AP does."""

    @model_validator(mode="after")
    def _levels(self) -> DetModelSpec:
        if len(self.anchor_sizes) != len(self.scales) + 1:
            raise ValueError(
                f"{len(self.anchor_sizes)} anchor_sizes for {len(self.scales)} scales: give one a scale, and one more"
            )
        return self


class PruneSpec(Spec):
    """What is pruned, when, and how it comes back."""

    reducer: str = "none"
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reducer."""
    schedule: dict[str, Any] = Field(default_factory=lambda: {"constant": {"rate": 0}}, validate_default=True)
    """As ``Schedule.from_config`` reads it."""
    fusion: Fusion = "none"
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
    objects: tuple[int, int] = (1, 1)
    """Whole digits in an image, at least and at most. They do not overlap."""
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


class SegDataSpec(Spec):
    """Images of semantic segmentation, in the layout of ADE20k; defaults are the authors' (reference, section 3.2)."""

    image_size: int = Field(512, ge=8)
    """Side of the square training crops, and of the windows of evaluation."""
    num_classes: int = Field(150, ge=2, le=254)
    """Classes to tell apart. In a file they are 1, 2, ...; 0 is not labelled, and ignored."""
    resize: Range = (0.5, 2.0)
    """Training: range of the shorter side, in units of ``image_size``; the longer side is at most four times it."""
    cat_max_ratio: float = Field(0.75, gt=0, le=1)
    """Training: largest share of one class in a crop. Ten crops are tried, the last is taken in any case."""
    hflip: float = Field(0.5, ge=0, le=1)
    photometric: bool = True
    """Training: random brightness, contrast, saturation and hue."""
    evaluation: Literal["single", "slide"] = "single"
    """``single``: the authors' way, the whole image shrunk into one window; ``slide``: windows over the image as it is,
    their logits averaged where they overlap."""
    stride: int | None = Field(None, ge=1)
    """Distance of windows that slide, in pixels; None: ``image_size``, as the authors have it (no overlap)."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    scenes: ScenesSpec | None = None
    """Which generated set this is; None for a folder of the user's."""


class DetDataSpec(Spec):
    """Images of object detection, in the layout of COCO 2017; defaults are those of the paper's EVA-02 detector."""

    image_size: int = Field(1536, ge=32)
    """Side of the square into which images are padded. Evaluation resizes the longer side to it."""
    num_classes: int = Field(80, ge=1)
    """Categories of the annotation files; the background is not one of them."""
    scale: Range = (0.1, 2.0)
    """Large-scale jitter: training images are resized to this range times the size that fits into the square."""
    hflip: float = Field(0.5, ge=0, le=1)
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
    decay: Literal["cosine", "poly", "constant"] = "cosine"
    """How the learning rate falls to ``min_lr`` after warm-up: a half cosine; (1 - t) ** 0.9, the authors' for
    segmentation; or not at all."""
    min_lr: float = Field(1e-6, ge=0)
    warmup_epochs: float = Field(5, ge=0)
    layer_decay: float = Field(0.75, gt=0, le=1)
    """1 is none. The authors' segmentation states 0.9, but their scheduler ignores it: 1 is at par with their numbers,
    0.9 is what they meant."""
    curriculum: bool = False
    """The pruning rate rises linearly from 0 over the first half of the run (the authors' segmentation)."""
    query_lr: float = Field(1.0, gt=0)
    """Learning-rate scale of Cropr's queries. They start at unit length, where their attention is almost uniform."""
    weight_decay: float = Field(0.05, ge=0)
    clip_grad: float | None = None
    grad_checkpointing: bool = False
    """Compute each block again in the backward pass, not keep its activations: less memory, a third more time."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights over steps, which is then evaluated and kept; None for none."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    """bf16 and fp16 are autocast; fp16 scales the loss on CUDA."""

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up of a parameter with layer scale 1."""
        return self.base_lr * self.batch_size / 256


DATA: dict[Task, type[DataSpec] | type[SegDataSpec] | type[DetDataSpec]] = {
    "classification": DataSpec,
    "segmentation": SegDataSpec,
    "detection": DetDataSpec,
}
"""What describes the data of a task."""


class TrainSpec(Spec):
    """One training run, without its seed."""

    task: Task = "classification"
    model: ModelSpec
    prune: PruneSpec = PruneSpec()
    data: DataSpec | SegDataSpec | DetDataSpec = Field(DataSpec(), validate_default=True)
    """The task's own, as ``DATA`` has it."""
    detector: DetModelSpec = DetModelSpec()
    """Detection: what stands around the encoder."""
    recipe: RecipeSpec = RecipeSpec()
    init: Literal["random", "timm"] | str = "random"
    """Weights to start from: ``random``, ``timm`` (the pretrained tag of the model's name), or the digest of the
    training run that made them."""

    @field_validator("data", mode="before")
    @classmethod
    def _of_the_task(cls, value: Any, info: ValidationInfo) -> Any:
        kind = DATA.get(info.data.get("task"))  # type: ignore[arg-type]  # an unknown task is refused by its own field
        if kind is None or isinstance(value, kind):
            return value
        return kind.model_validate({} if value == DataSpec() else value)


Precision = Literal["fp32", "bf16", "fp16", "amp_bf16", "amp_fp16"]
"""Number format of a measurement: model and images cast to it, or with ``amp_``, fp32 weights under autocast."""
Attention = Literal["auto", "math", "flash", "efficient", "cudnn"]
"""Attention kernel that is forced; ``auto`` leaves the choice to torch."""


class BenchSpec(Spec):
    """One throughput measurement: unpruned and pruned model, interleaved in one process."""

    model: ModelSpec
    prune: PruneSpec
    detector: DetModelSpec | None = None
    """The encoder of this detector, with its windows, is compared; pyramid and heads are timed beside it. None: a
    classifier."""
    image_size: int = 224
    pruned_image_size: int | None = None
    """Image size of the second model where it differs: an unpruned model on a smaller image is a rival, too."""
    batch_size: int = Field(4, ge=1)
    precision: Precision = "fp32"
    rounds: int = Field(7, ge=3)
    warmup: int = Field(1, ge=1)
    attention: Attention = "auto"
    compile: bool = False
    """Run both models through ``torch.compile``, in one graph."""
    channels_last: bool = False
    """Memory layout of images and of the patch embedding's weights."""

    @model_validator(mode="after")
    def _one_size(self) -> BenchSpec:
        if self.detector is not None and self.pruned_image_size not in (None, self.image_size):
            raise ValueError("a detector's encoders are compared on one image size; leave pruned_image_size out")
        return self


class PlanSpec(Spec):
    """Which schedules reach these targets on one device? See ``cropr.bench.planner``."""

    model: ModelSpec
    prune: PruneSpec
    """Reducer and fusion. The schedule is what is looked for: it stays at rate 0."""
    image_size: int = Field(224, ge=8)
    batch_size: int = Field(4, ge=1)
    precision: Precision = "fp32"
    family: Literal["auto", "constant", "stages", "early"] = "auto"
    """Shape of the schedule; auto takes the first of the others that reaches the target."""
    align: int = Field(1, ge=1)
    """Token counts, prefix included, are rounded up to a multiple of this."""
    quantity: Literal["speedup", "latency_ms", "flops"] = "speedup"
    """What a target is: speed-up at least, milliseconds a batch or share of the unpruned FLOPs at most."""
    targets: tuple[float, ...] = Field((1.5,), min_length=1)
    rounds: int = Field(7, ge=3)
    """Readings of every clock."""
    verify: bool = False
    """Also measure the planned schedules."""

    @model_validator(mode="after")
    def _plannable(self) -> PlanSpec:
        if self.prune.schedule != PruneSpec().schedule:
            raise ValueError("prune.schedule is what the plan looks for; leave it out")
        if self.prune.reducer == "none" or self.prune.fusion not in ("none", "llf"):
            raise ValueError(
                f"reducer {self.prune.reducer!r} with fusion {self.prune.fusion!r} cannot be planned; name a reducer "
                "that prunes, and fusion 'llf' or 'none'"
            )
        if bad := [target for target in self.targets if not 0 < target < float("inf")]:
            raise ValueError(f"target {bad[0]:g} must be a positive number")
        return self
