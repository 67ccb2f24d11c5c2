"""Specifications of measurements, without torch. Defaults measure the paper's ViT-L/16 with Cropr at R=8."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cropr.specs import ModelSpec, PruneSpec, Spec
from cropr.tasks import TASKS

if TYPE_CHECKING:
    from cropr.tasks.detection import DetModelSpec
else:  # by the table of tasks: a bench of a classifier needs no module of detection
    DetModelSpec = TASKS["detection"].detector

UNPRUNED = "unpruned"
"""Name of the timm model itself among its variants."""


def _distinct(value: Any) -> Any:
    if len(set(value)) < len(value):
        raise ValueError("give every value once")
    return value


Distinct = AfterValidator(_distinct)
Positive = Annotated[int, Field(ge=1)]
Rounds = Annotated[int, Field(ge=3)]
Speedup = Annotated[float, Field(ge=1, allow_inf_nan=False)]

Precision = Literal["fp32", "bf16", "fp16", "amp_bf16", "amp_fp16"]
"""Number format of a measurement: model and images cast to it, or with ``amp_``, fp32 weights under autocast."""
Attention = Literal["auto", "math", "flash", "efficient", "cudnn"]
"""Attention kernel that is forced; ``auto`` leaves the choice to torch."""


class _Compared(Spec):
    """What measurements of a pruned model beside the unpruned one share."""

    model: ModelSpec
    prune: PruneSpec
    image_size: int = Field(224, ge=8)
    """Pixels a side of the images."""
    batch_size: Positive = 4
    """Images per forward pass."""
    precision: Precision = "fp32"
    """A cast of the models, or autocast: amp_*."""
    rounds: Rounds = 7
    """Timed rounds of all models."""


class BenchSpec(_Compared):
    """One throughput measurement: unpruned and pruned model, interleaved in one process."""

    detector: DetModelSpec | None = None
    """Its encoder, with its windows, is compared; pyramid and heads are timed beside it. None for a classifier."""
    pruned_image_size: int | None = None
    """Image size of the second model where it differs: an unpruned model on a smaller image is a baseline, too."""
    warmup: Positive = 1
    """Untimed passes before the rounds; 2 to read memory."""
    attention: Attention = "auto"
    """Attention kernel to force; auto: torch chooses."""
    compile: bool = False
    """Run both models through ``torch.compile``, in one graph."""
    channels_last: bool = False
    """Memory layout of images and of the patch embedding's weights."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.detector is not None and self.pruned_image_size not in (None, self.image_size):
            raise ValueError("a detector's encoders are compared on one image size; leave pruned_image_size out")
        return self


class PlanSpec(_Compared):
    """Which schedules reach these speed-ups on one device? That of ``prune`` is the result: it stays at rate 0."""

    align: Positive = 1
    """Token counts, prefix included, are rounded up to a multiple of this."""
    targets: Annotated[tuple[Speedup, ...], Distinct, Field(min_length=1)] = (1.5,)
    """Speed-ups over the unpruned model, one or several, each 1 or more."""
    verify: bool = False
    """Measure the schedules and correct them; otherwise a target is a ratio of multiply-adds."""

    @model_validator(mode="after")
    def _plannable(self) -> Self:
        if self.prune.schedule != PruneSpec().schedule:
            raise ValueError("prune.schedule is the result of a plan; leave it out")
        if self.prune.reducer == "none" or self.prune.fusion not in ("none", "llf"):
            named = f"reducer {self.prune.reducer!r} with fusion {self.prune.fusion!r}"
            raise ValueError(f"{named} cannot be planned; name a reducer that prunes, and fusion 'llf' or 'none'")
        return self
