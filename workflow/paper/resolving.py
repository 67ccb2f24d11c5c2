"""A row of a table and a scale -> the specifications of its jobs. Used by ``workflow.paper.grid``; no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cropr.bench.specs import MEASURES, BenchSpec, PlanSpec
from cropr.pruning.methods import FUSIONS, REDUCERS, before_last_block
from cropr.pruning.schedule import Schedule, attended
from cropr.specs import ImagesSpec, ModelSpec, PruneSpec, RecipeSpec, Spec, check
from cropr.tasks import TASKS
from cropr.training.specs import TrainSpec
from workflow.paper.configuration import RowConfig, ScaleConfig, merge

UNPRUNED = RowConfig(row="none", label="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row at a scale; manifests contain it as it is. A microbenchmark has ``row``, ``label`` and ``bench`` only."""

    row: str
    label: str
    reducer: str | None = None
    fusion: str | None = None
    schedule: str | None = None
    """As text, like the other columns of a table."""
    pool: str | None = None
    image_size: int | None = None
    aux_weight: float | None = None
    options: str | None = None
    paper_schedule: str | None = None
    """Schedule of the model whose speed is measured, if that is the paper's."""
    why: str | None = None
    """Why it does not run; None for a row that does."""
    run: str | None = None
    """Id of its training run."""
    records: tuple[str, ...] = ()
    """Paths of the training records, one a seed, relative to the repository like all paths."""
    bench: str | None = None
    """Path of the record of its speed measurement or microbenchmark."""
    maps: str | None = None
    """Path of its pruning maps."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A scale, and the file it comes from, for error messages."""

    name: str
    config: ScaleConfig
    source: str


class TaskAtScale:
    """What a scale says of a task, checked.

    Raises:
        ValueError: the scale lacks the task, or model, data and detector do not fit together.
    """

    def __init__(self, task: str, scale: Scale, root: Path | None) -> None:
        if task not in scale.config.tasks:
            raise ValueError(f"{scale.source}: tasks has no {task}; it has {', '.join(scale.config.tasks)}")
        self.task, self.config, self.source = TASKS[task], scale.config.tasks[task], f"{scale.source}: tasks.{task}"
        self.data = self._data(root)
        self.detector = self._detector()

    def model(self, row: RowConfig, pretrained: bool) -> ModelSpec:
        """Model of a row; ``pretrained`` False drops the tag of the weights and stochastic depth."""
        model = self.config.model
        args = model.args | model.pools[row.pool]
        if pretrained:
            return ModelSpec(name=model.name, args=args, drop_path=model.drop_path)
        return ModelSpec(name=model.name.partition(".")[0], args=args)

    def image_size(self, row: RowConfig) -> int:
        """Pixels a side."""
        return self.config.image_sizes[row.image_size] if row.image_size else self.data.image_size

    def schedule(self, where: str, row: RowConfig) -> Schedule:
        """The schedule that a row names, checked against model and image size.

        Raises:
            ValueError: a name that the scale lacks, or a schedule that does not fit.
        """
        config, model = self.config, self.config.model
        if row.fusion not in FUSIONS:
            raise ValueError(f"{where}: fusion = {row.fusion!r} is unknown; choose one of {', '.join(FUSIONS)}")
        if row.reducer == "none" and row.schedule != "none":
            names = ", ".join(name for name in REDUCERS if name != "none")
            raise ValueError(f"{where}: schedule = {row.schedule!r} without a reducer; choose one of {names}")
        for key, value, known, place in (
            ("pool", row.pool, model.pools, "model.pools"),
            ("image_size", row.image_size, config.image_sizes, "image_sizes"),
            ("schedule", row.schedule, {"none": {}, **config.schedules}, "schedules"),
        ):
            if value is not None and value not in known:
                raise ValueError(f"{where}: {key} = {value!r}: {self.source} has {', '.join(known)} in {place}")
        named = config.schedules.get(row.schedule, {"constant": {"rate": 0}})
        try:
            return self._checked(Schedule.from_config(named), row)
        except (ValueError, TypeError, AttributeError) as error:
            key = f"{self.source}.schedules.{row.schedule} = {named}"
            raise ValueError(f"{key}: {error} (needed by {where})") from None

    def _checked(self, schedule: Schedule, row: RowConfig) -> Schedule:
        """The schedule; refuses counts that the model, or the windows of a detector, cannot have."""
        model, size, window = self.config.model, self.image_size(row), getattr(self.detector, "window", 1)
        if size % (step := model.patch_size * window):
            raise ValueError(f"image size {size} must be a multiple of {step}: patch size x window of the detector")
        patches, fused = (size // model.patch_size) ** 2, before_last_block(row.fusion)
        counts = schedule.resolve(patches, model.depth, fused, model.prefix)
        for block, count in enumerate(attended(counts, patches, fused), start=1):
            if count % window**2 and block not in getattr(self.detector, "global_blocks", ()):
                raise ValueError(f"{count} patches enter block {block}, whose windows need a multiple of {window**2}")
        return schedule

    def _data(self, root: Path | None) -> ImagesSpec:
        values = {key: value for key, value in self.config.data.items() if key != "root"}
        if values.get("num_classes", 0) is None:
            if root is None or self.task.name != "classification":
                raise ValueError(f"{self.source}.data.num_classes is missing; only your own class folders are counted")
            classes = values["num_classes"] = sum(entry.is_dir() for entry in (root / "train").iterdir())
            if classes < 2:
                raise ValueError(f"{root / 'train'} has {classes} class folders; it needs two or more")
        return check(self.task.data, values, f"{self.source}.data")

    def _detector(self) -> Any:
        """What stands around the encoder; None for a task without it."""
        kind, values, depth = self.task.detector, self.config.detector, self.config.model.depth
        if kind is None:
            if values is not None:
                raise ValueError(f"{self.source}.detector: {self.task.name} has no detector; leave this key out")
            return None
        detector: Any = check(kind, values or {}, f"{self.source}.detector")
        blocks = detector.global_blocks
        if depth not in blocks or min(blocks) < 1 or max(blocks) > depth:
            raise ValueError(
                f"{self.source}.detector.global_blocks = {list(blocks)}: blocks count from 1 to model.depth = {depth}, "
                "and the last must be among them"
            )
        return detector


class Resolver:
    """Rows to specifications, which it collects by id."""

    def __init__(self, scale: Scale, paper: Scale, seeds: tuple[int, ...], roots: Mapping[str, Path | None]) -> None:
        self.scale, self.paper, self.seeds, self.results = scale, paper, seeds, f"results/{scale.name}"
        self.given = roots
        self.runs: dict[str, TrainSpec] = {}
        self.benches: dict[str, BenchSpec] = {}
        self.microbenches: dict[str, Spec] = {}
        self.names: dict[str, str] = {}
        self.tasks: dict[str, TaskAtScale] = {}
        self.measured: dict[str, TaskAtScale] = {}
        self.roots: dict[str, Path | None] = {}
        self.pretrains: dict[str, TrainSpec] = {}

    def open(self, task: str) -> None:
        """Read what the scale says of a task. Rows of that task need it."""
        root = self.roots[task] = find_root(task, self.scale, self.given)
        own = self.tasks[task] = TaskAtScale(task, self.scale, root)
        self.measured[task] = TaskAtScale(task, self.paper, root) if own.config.bench.model == "paper" else own
        if own.config.pretrain is not None:
            self.pretrains[task] = self._train(own, own.config.pretrain.recipe, UNPRUNED, PruneSpec(), "random")

    def row(self, where: str, name: str, listed: RowConfig, meant: RowConfig, task: str, needs: Collection[str]) -> Row:
        """Resolve a row.

        Args:
            where: file and row, for error messages.
            name: ``artefact/row``.
            listed: the row itself, which gives name and label.
            meant: the row that says what is run: another one if ``use`` names it.
            task: of its artefact.
            needs: what its artefact reads.

        Raises:
            ValueError: a name that does not exist, or a schedule that does not fit.
        """
        own, measured = self.tasks[task], self.measured[task]
        schedule, why = own.schedule(where, meant), None
        if meant.reducer not in REDUCERS:
            if (why := meant.why) is None:
                raise ValueError(
                    f"{where}: reducer = {meant.reducer!r} is unknown; choose one of {', '.join(REDUCERS)}, or say why "
                    "it does not exist yet (key why)"
                )
        elif meant.scales is not None and self.scale.name not in meant.scales:
            why = f"left out at the {self.scale.name} scale"
        run, bench, settings = None, None, own.config.bench
        if why is None:
            prune = _prune(where, meant, schedule)
            init = self.pretrains[task].digest() if task in self.pretrains else "timm"
            run = self._keep(self.runs, name, self._train(own, own.config.recipe, meant, prune, init))
            if "bench" in needs and listed.row in (settings.rows or [listed.row]):
                bench = self._keep(self.benches, name, self._bench(where, own, measured, meant))
        return Row(
            row=listed.row,
            label=listed.label,
            reducer=meant.reducer,
            fusion=meant.fusion,
            schedule=schedule.describe(),
            pool=meant.pool,
            image_size=own.image_size(meant),
            aux_weight=meant.aux_weight,
            options=", ".join(f"{key}={value}" for key, value in meant.options.items()),
            paper_schedule=measured.schedule(where, meant).describe() if settings.model == "paper" else None,
            why=why,
            run=run,
            records=tuple(f"{self.results}/runs/{run}/seed{seed}/record.json" for seed in self.seeds) if run else (),
            bench=f"{self.results}/bench/{bench}/record.json" if bench else None,
            maps=f"{self.results}/maps/{run}/seed{self.seeds[0]}.npz" if run and "maps" in needs else None,
        )

    def microbench(self, where: str, name: str, row: RowConfig) -> Row:
        """Resolve a row that is a microbenchmark or a plan.

        Raises:
            ValueError: no such measurement, or settings that it does not have.
        """
        kinds: dict[str, type[Spec]] = dict(MEASURES) | {"plan": PlanSpec}
        if row.measure is None or row.measure not in kinds:
            raise ValueError(f"{where}: measure = {row.measure!r}: choose one of {', '.join(kinds)}")
        kind, settings = kinds[row.measure], row.settings
        for key in (name.partition("/")[0], name):
            settings = merge(settings, self.scale.config.microbench.get(key, {}))
        if "measure" in kind.model_fields:
            settings = {**settings, "measure": row.measure}
        spec = self._keep(self.microbenches, name, check(kind, settings, f"{where}: settings"))
        return Row(row=row.row, label=row.label, bench=f"{self.results}/microbench/{spec}/record.json")

    def _keep(self, table: dict[str, Any], name: str, spec: Spec) -> str:
        """Add a specification to its table; its id."""
        table[spec.digest()] = spec
        self.names.setdefault(spec.digest(), name)
        return spec.digest()

    def _train(self, own: TaskAtScale, recipe: RecipeSpec, row: RowConfig, prune: PruneSpec, init: str) -> TrainSpec:
        return TrainSpec(
            task=own.task.name,
            model=own.model(row, pretrained=True),
            prune=prune,
            data=own.data.model_copy(update={"image_size": own.image_size(row)}),
            detector=own.detector,
            recipe=recipe,
            init=init,
        )

    def _bench(self, where: str, own: TaskAtScale, measured: TaskAtScale, row: RowConfig) -> BenchSpec:
        """Speed of the deployed form of a row, on the measured model, which needs no trained weights."""
        dropped = {"options": {k: v for k, v in row.options.items() if k not in REDUCERS[row.reducer].training_only}}
        prune = _prune(where, row.model_copy(update=dropped | {"aux_weight": 1.0}), measured.schedule(where, row))
        return BenchSpec(
            model=measured.model(row, pretrained=False),
            prune=prune,
            detector=measured.detector,
            image_size=measured.data.image_size,
            pruned_image_size=measured.image_size(row) if row.image_size else None,
            **own.config.bench.model_dump(exclude={"model", "rows"}),
        )


def _prune(where: str, row: RowConfig, schedule: Schedule) -> PruneSpec:
    values = row.model_dump(include={"reducer", "options", "fusion", "aux_weight"})
    return check(PruneSpec, values | {"schedule": schedule.to_config()}, where)


def find_root(task: str, scale: Scale, roots: Mapping[str, Path | None]) -> Path | None:
    """The user's folder of a task, with its subfolders checked; None if images are generated.

    Raises:
        ValueError: neither generated nor named, or not given.
        FileNotFoundError: a subfolder is missing.
    """
    data, folders, source = scale.config.tasks[task].data, TASKS[task].folders, f"{scale.source}: tasks.{task}.data"
    if (key := data.get("root")) is None:
        if data.get("scenes") is None:
            raise ValueError(f"{source}: give scenes (generated) or root (one of {', '.join(roots)})")
        return None
    if key not in roots:
        raise ValueError(f"{source}.root = {key!r}: choose one of {', '.join(roots)}")
    root, needed = roots[key], f"a folder with {', '.join(folders)}"
    if root is None:
        raise ValueError(f"config/config.yaml: {key} = null, but this scale reads {needed}: --config {key}=/path/to/it")
    for name in folders:
        if not (root / name).is_dir():
            raise FileNotFoundError(
                f"config/config.yaml: {key} = {root}: {root / name} is missing; {key} names {needed}"
            )
    return root
