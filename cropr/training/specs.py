"""What a training run is told; no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from cropr.specs import ImagesSpec, ModelSpec, PruneSpec, RecipeSpec, Spec, check
from cropr.tasks import TASKS


class TrainSpec(Spec):
    """One training run, without its seed."""

    task: str = "classification"
    model: ModelSpec
    prune: PruneSpec = PruneSpec()
    data: SerializeAsAny[ImagesSpec] = Field(None, validate_default=True)
    """Of the class that the task names (``cropr.tasks.TASKS``)."""
    detector: SerializeAsAny[Spec] | None = Field(None, validate_default=True)
    """What stands around the encoder, of the class that the task names; None for a task that names none."""
    recipe: RecipeSpec = RecipeSpec()
    init: Literal["random", "timm"] | str = "random"
    """Weights to start from: ``random``, ``timm`` (the pretrained tag of the model's name), or the digest of the
    training run that made them."""

    @field_validator("task")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in TASKS:
            raise ValueError(f"unknown task {value!r}; choose one of {', '.join(TASKS)}")
        return value

    @field_validator("data", "detector", mode="before")
    @classmethod
    def _of_the_task(cls, value: Any, info: ValidationInfo) -> Any:
        task = TASKS.get(info.data.get("task", ""))
        if task is None:  # refused by its own field
            return value
        assert info.field_name is not None
        kind: type[Spec] | None = getattr(task, info.field_name)
        if kind is None:
            if value is not None:
                raise ValueError(f"{task.name} has no {info.field_name}; leave it out (older specs had one)")
            return None
        return value if isinstance(value, kind) else check(kind, {} if value is None else value, kind.__name__)
