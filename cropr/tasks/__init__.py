"""Tasks by name; the spec of a training run. A task is a package here: its torch-free ``__init__`` holds ``TASK``."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from cropr.specs import ImagesSpec, ModelSpec, PruneSpec, RecipeSpec, Spec, check

if TYPE_CHECKING:
    from cropr.tasks.base import TaskRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Entry of a task. Each package in ``cropr.tasks`` holds one, named ``TASK``."""

    name: str
    """As in specs and configuration."""
    run: str
    """``module:Class`` of its ``TaskRun``."""
    show: str
    """``module:Class`` of its ``cropr.show.Answers``, for pruning maps."""
    data: type[ImagesSpec]
    """Describes its images."""
    detector: type[Spec] | None = None
    """Describes pyramid and heads around the encoder; None without them."""
    layout: str
    """Name of the public layout that its images lie in."""
    folders: tuple[str, ...]
    """Folders of that layout, under the root."""
    metrics: Mapping[str, str]
    """Metric in percent -> label, in order of importance; rows are ranked by the first."""

    def load(self, path: str) -> Any:
        """The class behind ``run`` or ``show``. Imports torch."""
        module, _, name = path.partition(":")
        return getattr(import_module(module), name)


_PACKAGES = sorted(file.parent.name for file in Path(__file__).parent.glob("*/__init__.py"))
_MODULES = [import_module(f"{__name__}.{name}") for name in _PACKAGES]
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES if hasattr(module, "TASK")}
"""Every task by name."""


class TrainSpec(Spec):
    """One training run, without its seed."""

    task: str = "classification"
    model: ModelSpec
    prune: PruneSpec = PruneSpec()
    data: SerializeAsAny[ImagesSpec] = Field(None, validate_default=True)
    """Of the class that the task names (``TASKS``)."""
    detector: SerializeAsAny[Spec] | None = Field(None, validate_default=True)
    """What stands around the encoder, of the class that the task names; None for a task that names none."""
    recipe: RecipeSpec = RecipeSpec()
    init: Literal["random", "timm"] | str = "random"
    """Weights to start from: ``random``, ``timm`` (the pretrained tag of the model's name), or the digest of the
    training run that made them."""
    teacher: str | None = None
    """Digest of a training run of the same model, unpruned, whose predictions and tokens are learnt, too (distillation
    of DynamicViT; classification alone). If None, none are."""

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

    @model_validator(mode="after")
    def _ignored_class_exists(self) -> Self:
        ignored, classes = self.recipe.aux_ignore, self.data.num_classes
        if ignored is not None and ignored >= classes:
            raise ValueError(f"recipe.aux_ignore = {ignored}: must be below data.num_classes = {classes}, or left out")
        return self


def open_task(spec: TrainSpec, root: Path | None) -> "TaskRun":
    """The run of a specification, with its images; raises what ``TaskRun`` raises. Imports torch."""
    task = TASKS[spec.task]
    return cast("TaskRun", task.load(task.run)(spec, root))
