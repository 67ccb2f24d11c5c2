"""The keys of the files under ``config/``. Errors name file, key, value and what is allowed. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cropr.specs import RecipeSpec

Pool = Literal["avg", "cls"]
Need = Literal["train", "bench", "maps", "truth", "microbench"]


class Block(BaseModel):
    """Base of all parts: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelBlock(Block):
    """The model of a scale. ``patch_size``, ``depth`` and ``prefix`` describe what timm builds, so that schedules can
    be checked without timm; a test compares them with the model."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)
    drop_path: float = Field(0.0, ge=0, lt=1)
    patch_size: int = Field(16, ge=1)
    depth: int = Field(ge=2)
    prefix: int = Field(1, ge=0)
    pools: dict[Pool, dict[str, Any]]
    """Pooling -> arguments for timm."""


class PretrainBlock(Block):
    """How the weights are trained that every run starts from."""

    recipe: RecipeSpec
    shipped: str | None = None
    """Weights file in the repository; used if this very specification made it."""


class BenchBlock(Block):
    """How throughput is measured."""

    model: Literal["paper", "own"] = "paper"
    """``paper``: the model and the schedules of the scale ``paper``; ``own``: those of this scale."""
    batch_size: int = Field(4, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    rounds: int = Field(7, ge=3)
    warmup: int = Field(1, ge=1)
    rows: list[str] | None = Field(None, min_length=1)
    """Rows that are measured, each against the unpruned model; None: all."""


class JobsBlock(Block):
    """Resources of one training run."""

    threads: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0)


class TaskConfig(Block):
    """A task at a scale: what the names in its rows mean."""

    model: ModelBlock
    schedules: dict[str, dict[str, Any]]
    image_sizes: dict[str, int] = Field(default_factory=dict)
    data: dict[str, Any]
    """Keys of ``Task.data``, and perhaps ``root``: the key of config.yaml that names the user's folder. Without
    ``root``, ``scenes`` are generated. If ``num_classes`` is null, class folders are counted."""
    recipe: RecipeSpec
    pretrain: PretrainBlock | None = None
    """None: timm's weights of the model's name."""
    detector: dict[str, Any] | None = None
    """Keys of ``Task.detector``; None: its defaults. Only for tasks that have a detector."""
    bench: BenchBlock = BenchBlock()


class ScaleConfig(Block):
    """``config/scales/<scale>.yaml``."""

    title: str
    seeds: int | list[int] = 1
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    """Artefacts of other tasks do not exist at this scale."""
    jobs: JobsBlock = JobsBlock()
    microbench: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """``artefact/row``, or ``artefact`` for all its rows: laid over the settings of those microbenchmarks."""
    maps: int = Field(8, ge=1)
    """Number of validation images for which pruning maps are saved."""


class RowConfig(Block):
    """One row of a table, for every scale."""

    row: str = Field(pattern=r"^[a-z0-9][a-z0-9_.]*$")
    label: str
    use: str | None = None
    """``artefact/row``: the same run as that row. Only ``row`` and ``label`` may be given with it."""
    reducer: str = "none"
    options: dict[str, Any] = Field(default_factory=dict)
    schedule: str = "none"
    fusion: str = "none"
    pool: Pool = "avg"
    aux_weight: float = Field(1.0, ge=0)
    image_size: str | None = None
    """Key of the scale's ``image_sizes``; None: the image size of its data."""
    measure: str | None = None
    """A microbenchmark, or ``plan``, instead of a run; ``settings`` are the keys of its specification."""
    settings: dict[str, Any] = Field(default_factory=dict)
    scales: list[str] | None = None
    """Scales that have this row; None: all."""
    why: str | None = None
    """Why the row cannot run: its reducer does not exist yet."""


class ArtefactConfig(Block):
    """``config/experiments/<artefact>.yaml``: one table or figure."""

    order: int
    """Position in the report; earlier artefacts are also computed earlier."""
    section: str
    """Heading of the report under which it stands."""
    title: str
    question: str
    """What it answers, in one sentence."""
    paper_model: str | None = None
    """Model and data of the published numbers."""
    task: str = "classification"
    baseline: str | None = None
    """Row that the others are compared with."""
    needs: list[Need] = ["train"]
    """What it reads. ``truth``: only at scales whose data say which patches matter. ``microbench`` is used alone."""
    rows: list[RowConfig] = Field(min_length=1)

    @property
    def is_microbench(self) -> bool:
        """Whether its rows are microbenchmarks, which need neither images nor training."""
        return "microbench" in self.needs

    @model_validator(mode="after")
    def _consistent(self) -> ArtefactConfig:
        names = [row.row for row in self.rows]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"row {twice[0]!r} is given twice; names must be unique")
        if self.baseline not in (None, *names):
            raise ValueError(f"baseline = {self.baseline!r} is no row; choose one of {', '.join(names)}")
        if self.is_microbench and len(self.needs) > 1:
            raise ValueError("needs: microbench is used alone; put rows that are trained into another artefact")
        if wrong := [row.row for row in self.rows if (row.measure is not None) != self.is_microbench]:
            raise ValueError(f"row {wrong[0]!r}: give `measure` if, and only if, the artefact needs [microbench]")
        return self


class Settings(Block):
    """``config/config.yaml``, with ``--config`` and ``--configfile`` laid over it."""

    scale: str = "laptop"
    seeds: int | list[int] | str | None = None
    """A number n for seeds 0 to n-1, or a list; None: as many as the scale says."""
    imagenet: Path | None = None
    ade20k: Path | None = None
    coco: Path | None = None
    folder: Path | None = None
    pretrain: Literal["shipped", "make"] = "shipped"
    row: str | None = None
    """Row that the target ``compare`` trains and compares with its baseline."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Laid over the scale's file, key by key."""

    @property
    def roots(self) -> dict[str, Path | None]:
        """The user's folders, by the key that names them."""
        return {"imagenet": self.imagenet, "ade20k": self.ade20k, "coco": self.coco, "folder": self.folder}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        FileNotFoundError: no such file; the message lists the files beside it.
        ValueError: not YAML, or no mapping.
    """
    if not path.is_file():
        beside = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"{path}: no such file; there are: {beside}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold keys with values, holds {type(values).__name__}")
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, mappings key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def parse_seeds(seeds: int | str | Iterable[int | str], name: str = "seeds") -> tuple[int, ...]:
    """``3`` -> (0, 1, 2); a list, or text such as ``0,2,5``, gives those seeds.

    Raises:
        ValueError: anything else, an empty list, or a seed given twice.
    """
    try:
        if isinstance(seeds, str):
            seeds = [int(part) for part in seeds.strip("[]").split(",")] if set(seeds) & set("[,") else int(seeds)
        parsed = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(seed) for seed in seeds)
    except (TypeError, ValueError):
        parsed = ()
    if not parsed or len(set(parsed)) < len(parsed) or min(parsed) < 0:
        raise ValueError(f"{name} = {seeds!r}: give a number of seeds (3 means 0, 1, 2) or a list such as 0,2,5")
    return parsed
