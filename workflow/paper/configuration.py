"""The files under ``config/``, read and checked. Errors name file, key, value and what is allowed. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cropr.specs import RecipeSpec, check, load_yaml

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
    task: str | None = None
    """Task of this scale on whose images and losses the host is trained; None: the task itself."""
    then: RecipeSpec | None = None
    """Of a second run, on the task itself and without pruning, for heads that take long to train; None: none."""
    shipped: str | None = None
    """File in the repository with the weights of the last of these runs; used if this very specification made it."""


class BenchBlock(Block):
    """How throughput is measured."""

    model: Literal["paper", "own"] = "paper"
    """``paper``: the model and the schedules of the scale ``paper``; ``own``: those of this scale."""
    batch_size: int = Field(4, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    rounds: int = Field(7, ge=3)
    warmup: int = Field(1, ge=1)
    rows: list[str] | None = None
    """Rows that are measured, each against the unpruned model; None: all."""


class JobsBlock(Block):
    """Resources of one training run."""

    threads: int = Field(1, ge=1)
    """CPU threads a node."""
    gpus: int = Field(0, ge=0)
    """GPUs a node, one process each, which share the batch of the recipe; 0: the CPU."""
    nodes: int = Field(1, ge=1)
    """More than one under SLURM only, and with GPUs."""


class TaskConfig(Block):
    """A task at a scale: what the names in its rows mean."""

    model: ModelBlock
    schedules: dict[str, dict[str, Any]]
    image_sizes: dict[str, int] = Field(default_factory=dict)
    data: dict[str, Any]
    """Keys of ``Task.data``, and perhaps ``root``: the key of config.yaml that names the user's folder; ``public``: the
    public set that is downloaded if no folder is given (key of ``PUBLIC``). Without both, ``scenes`` are generated. If
    ``num_classes`` is null, it is that of the public set, or class folders are counted."""
    recipe: RecipeSpec
    pretrain: PretrainBlock | None = None
    """None: timm's weights of the model's name."""
    detector: dict[str, Any] | None = None
    """Keys of ``Task.detector``; None: its defaults. Only for tasks that have a detector."""
    bench: BenchBlock = BenchBlock()
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> what is laid over this block, such as another model, for rows that name it."""


class ScaleConfig(Block):
    """``config/scales/<scale>.yaml``."""

    title: str
    seeds: int | list[int] = 1
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    """Artefacts of other tasks do not exist at this scale."""
    artefacts: list[str] | None = Field(None, min_length=1)
    """The artefacts of this scale; None: all of its tasks."""
    leave_out: list[str] = Field(default_factory=list)
    """Artefacts, and rows (``artefact/row``), that this scale does not run; a row with ``use`` follows the one that it
    names."""
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
    variant: str | None = None
    """Key of the task's ``variants`` at the scale, for a row with another model; None: the task as it is."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Laid over the scale's recipe."""
    start: str | None = None
    """``artefact/row`` with whose weights, of the same seed, it starts; None: those of the scale."""
    teacher: str | None = None
    """``artefact/row`` of an unpruned run from which it learns, too (``TrainSpec.teacher``)."""
    repeat: bool = False
    """Runs with every seed of the scale. Other rows run with the first, unless the call names seeds."""
    measure: str | None = None
    """A microbenchmark, or ``plan``, instead of a run; ``settings`` are the keys of its specification."""
    settings: dict[str, Any] = Field(default_factory=dict)


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
    scales: list[str] | None = None
    """Scales that have it; None: all."""
    needs: list[Need] = ["train"]
    """What it reads. ``truth``: only at scales whose data say which patches matter. ``microbench`` is used alone."""
    reads: list[str] = Field(default_factory=list)
    """Other artefacts whose records its notebook reads too."""
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
    source: Path | None = None
    """Archives of the public set that a scale names; None: they are downloaded."""
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
        FileNotFoundError, ValueError: no such file, with the files beside it; not YAML, or no mapping.
    """
    if not path.is_file():
        beside = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"{path}: no such file; there are: {beside}")
    return load_yaml(path.read_text(encoding="utf-8"), str(path))


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


@dataclass(frozen=True, slots=True)
class Scale:
    """A scale, and the file it comes from, for error messages."""

    name: str
    config: ScaleConfig
    source: str


def read_scale(folder: Path, name: str, overrides: Mapping[str, Any] | None = None) -> Scale:
    """Read and check a scale; ``overrides`` are laid over its file."""
    file = folder / "scales" / f"{name}.yaml"
    source = f"{file} with overrides" if overrides else str(file)
    return Scale(name, check(ScaleConfig, merge(read_yaml(file), overrides or {}), source), source)


def read_artefacts(folder: Path, scale: Scale) -> dict[str, ArtefactConfig]:
    """The artefacts of a scale, in their order. ValueError: the scale lists one that does not exist."""
    configs = {file.stem: _read_artefact(file, scale.config) for file in (folder / "experiments").glob("*.yaml")}
    listed = set(configs if scale.config.artefacts is None else scale.config.artefacts)
    if unknown := sorted(listed - set(configs)):
        choices = ", ".join(sorted(configs))
        raise ValueError(f"{scale.source}: artefacts: no artefact {unknown[0]!r}; choose among {choices}")
    _verify_names(scale, configs)
    listed |= {other for name in listed for other in configs[name].reads}
    listed -= (left := set(scale.config.leave_out))
    if missing := [(name, other) for name in sorted(listed) for other in configs[name].reads if other in left]:
        raise ValueError(f"{scale.source}: leave_out: {missing[0][0]} reads {missing[0][1]}; leave out both or none")
    ordered = sorted(((name, configs[name]) for name in listed), key=lambda item: (item[1].order, item[0]))
    here = {name: config for name, config in ordered if config.scales is None or scale.name in config.scales}
    return {name: config for name, config in here.items() if config.is_microbench or config.task in scale.config.tasks}


def _verify_names(scale: Scale, configs: Mapping[str, ArtefactConfig]) -> None:
    """Refuse keys of a scale that name rows which no artefact has."""
    rows = {f"{name}/{row.row}" for name, config in configs.items() for row in config.rows if not row.use}
    measured = {name for name, config in configs.items() if config.is_microbench}
    measured |= {row for row in rows if row.partition("/")[0] in measured}
    keys = [
        ("leave_out", scale.config.leave_out, rows | set(configs)),
        ("microbench", scale.config.microbench, measured),
    ]
    for task, config in scale.config.tasks.items():
        tables = [one for one in configs.values() if one.task == task and "bench" in one.needs]
        benches = {row.row for table in tables for row in table.rows}
        keys.append((f"tasks.{task}.bench.rows", config.bench.rows or (), benches))
    for key, given, known in keys:
        if unknown := sorted(set(given) - known):
            choices = ", ".join(sorted(known))
            raise ValueError(f"{scale.source}: {key}: no row {unknown[0]!r}; choose among {choices}")


def _read_artefact(file: Path, scale: ScaleConfig) -> ArtefactConfig:
    values = read_yaml(file)
    if isinstance(values.get("rows"), list):
        known = scale.tasks[task].schedules if (task := values.get("task", "classification")) in scale.tasks else {}
        values["rows"] = [one for row in values["rows"] for one in _each_schedule(row, known)]
    rows = enumerate(values["rows"] if isinstance(values.get("rows"), list) else ())
    names = {f"rows.{place}": f"row {row['row']}" for place, row in rows if isinstance(row, dict) and "row" in row}
    return check(ArtefactConfig, values, str(file), lambda key: names.get(".".join(key.split(".")[:2])))


def _each_schedule(row: Any, known: Collection[str]) -> list[Any]:
    """A row with a list of schedules stands for a row with each of them that is known, whose name ends in that of the
    schedule."""
    if not isinstance(row, dict) or not isinstance(row.get("schedule"), list):
        return [row]
    return [row | {"row": f"{row.get('row')}_{name}", "schedule": name} for name in row["schedule"] if name in known]
