"""What a job is told: typed, frozen, checked. One spec names one result; its digest is the name.

Pure Python and pydantic, no torch: the workflow and the command line read and write these.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from textwrap import shorten
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cropr.pruning.methods import FUSIONS, REDUCERS, choose
from cropr.pruning.schedule import Schedule


def _increasing(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError("the range must be positive and increasing, such as 0.5, 2")
    return value


Range = Annotated[tuple[float, float], AfterValidator(_increasing)]


class Spec(BaseModel):
    """Base of all specs: unknown keys are refused, values are not changed after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def digest(self) -> str:
        """Ten hex digits of the content: equal specs share a digest, on every machine. Values that are the default do
        not enter, so that a new key, off by default, leaves all earlier names alone."""
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
    fusion: str = "none"
    aux_weight: float = Field(1.0, ge=0)
    """Weight of the sum of the auxiliary losses."""

    @field_validator("schedule")
    @classmethod
    def _normalise(cls, value: Mapping[str, Any]) -> dict[str, Any]:
        return Schedule.from_config(value).to_config()

    @model_validator(mode="after")
    def _known(self) -> Self:
        allowed = choose(REDUCERS, "reducer", self.reducer).options
        choose(FUSIONS, "fusion", self.fusion)
        if unknown := sorted(set(self.options) - set(allowed)):
            has = ", ".join(allowed) or "none"
            raise ValueError(f"reducer {self.reducer!r} has no option {', '.join(unknown)}; it has {has}")
        return self


class ScenesSpec(Spec):
    """The embedded data set (see ``cropr.data.scenes``)."""

    image_size: int = Field(64, ge=16, le=2**15)
    """Pixels a side."""
    train: int = Field(20_000, ge=1)
    """Training images."""
    val: int = Field(2_000, ge=1)
    """Validation images."""
    scale: Range = (2.0, 2.0)
    """Size of digits and distractors, in units of their 8 px originals: drawn between these two."""
    distractors: tuple[int, int] = (7, 11)
    """Digits with shuffled quadrants in an image, at least and at most."""
    objects: tuple[int, int] = (1, 1)
    """Whole digits in an image, at least and at most. They do not overlap."""
    seed: int = 0
    """Of the generator."""

    @property
    def places(self) -> range:
        """Offsets, along an axis, at which digits of the largest scale lie side by side on a grid of 8 px."""
        side = round(8 * self.scale[1])
        return range(0, self.image_size - side + 1, -(-side // 8) * 8)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name, (fewest, most) in (("objects", self.objects), ("distractors", self.distractors)):
            if not 0 <= fewest <= most:
                raise ValueError(f"{name} {(fewest, most)} is not an increasing pair of counts")
        digits = f"at scale {self.scale[1]} in an image of {self.image_size} px"
        if 8 * self.scale[1] > self.image_size + 1 or not (room := len(self.places) ** 2):
            fix = f"lower scale to at most {self.image_size / 8:g} or raise image_size"
            raise ValueError(f"no digit fits {digits}; {fix}")
        if self.objects[1] > room:
            fix = "lower objects or scale, or raise image_size"
            raise ValueError(f"up to {self.objects[1]} digits {digits}, which has room for {room}; {fix}")
        return self


PUBLIC = {"fashion": {"imagenet": 10, "ade20k": 11}, "pets": {"imagenet": 37, "ade20k": 38, "coco": 37}}
"""Public sets that ``cropr.data.public`` writes: number of classes by layout."""


class ImagesSpec(Spec):
    """What the data specs of all tasks share."""

    image_size: int
    num_classes: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    scenes: ScenesSpec | None = None
    """Which generated set this is; None for a folder of the user's."""


class RecipeSpec(Spec):
    """How it is trained. Defaults are the authors' ImageNet recipe (docs/authors_code.md)."""

    epochs: int | float = Field(50, ge=0)
    """Passes over the training images; 0.5 ends after half of them, 0 evaluates the initial weights as they are."""
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
    aux_ignore: int | None = Field(None, ge=0)
    """Segmentation: a class, from 0, whose patches the auxiliary losses leave out, for a background that has most of
    the patches: auxiliary heads learn to answer it everywhere. None, as in the paper, for no class."""
    weight_decay: float = Field(0.05, ge=0)
    clip_grad: float | None = Field(None, gt=0)
    grad_checkpointing: bool = False
    """Compute each block again in the backward pass, not keep its activations: less memory, a third more time."""
    freeze_encoder: bool = False
    """Train only what pruning adds, and the heads: the encoder keeps the weights that it starts with."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights over steps, which is then evaluated and kept; None for none."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    """bf16 and fp16 are autocast; fp16 scales the loss on CUDA."""

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up of a parameter with layer scale 1."""
        return self.base_lr * self.batch_size / 256


def load_yaml(text: str, where: str) -> dict[str, Any]:
    """Keys and values of YAML or JSON. Raises: ValueError: ``where`` it stands, and what it is instead."""
    import yaml

    try:
        if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)) > ALIASES:
            raise ValueError(f"{where} has more than {ALIASES} aliases (*name), which can multiply; write values out")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is neither JSON nor YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys and values, found {type(values).__name__}")
    return values


Namer = Callable[[str], str | None]
RELATIONS = {"greater_than_equal": ">=", "greater_than": ">", "less_than_equal": "<=", "less_than": "<"}
ALIASES = 40
Model = TypeVar("Model", bound=BaseModel)


class Refused(ValueError):
    """Values that a model of pydantic refuses. ``problems`` are lines that begin with the key."""

    def __init__(self, where: str, problems: list[str]) -> None:
        super().__init__("\n".join(f"{where}: {problem}" for problem in problems))
        self.problems = problems


def check(model: type[Model], values: Any, where: str, name: Namer = lambda _: None) -> Model:
    """Validate values, which stand ``where`` an error begins with, such as a file. ``name`` gives a reader's name for
    what a dotted key stands in, such as a row of a list. Raises Refused, with a line for every problem."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise Refused(where, list(_problems(error, model, name))) from None


def _problems(error: ValidationError, model: type[BaseModel], name: Namer) -> Iterator[str]:
    for item in error.errors():
        key = ".".join(map(str, item["loc"])) or "it"
        if called := name(key):
            key += f" ({called})"
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, Refused):
            yield from (f"{key}.{problem}" for problem in inner.problems)
        elif item["type"] == "extra_forbidden":
            yield f"{key}: unknown key; allowed: {', '.join(_siblings(model, item['loc'][:-1]))}"
        elif item["type"] == "missing":
            yield f"{key} is missing"
        elif item["type"] in RELATIONS:
            limit = next(iter(item["ctx"].values()))
            yield f"{key} = {item['input']!r}: must be {RELATIONS[item['type']]} {limit:g}"
        else:
            message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            value = shorten(repr(item["input"]), 100, placeholder=" ...")
            yield f"{key} = {value}: {message}" if item["loc"] else message


def _siblings(model: type[BaseModel], location: Iterable[str | int]) -> list[str]:
    """Keys that are allowed at a location. Numbers, and keys of a mapping of models, lead no deeper."""
    parts = iter(location)
    for part in parts:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (kinds := _models(annotation)):
            return []
        model = kinds[0]
        if get_origin(annotation) is dict:
            next(parts, None)
    return sorted(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Models within an annotation such as ``list[Row]`` or ``Block | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
