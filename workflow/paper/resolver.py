"""Rows of tables to the specifications of their jobs. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cropr.bench.specs import BenchSpec, PlanSpec
from cropr.pruning.methods import FUSIONS, REDUCERS, before_last_block
from cropr.pruning.schedule import Schedule, attended
from cropr.specs import PUBLIC, ImagesSpec, ModelSpec, PruneSpec, RecipeSpec, Spec, check
from cropr.tasks import TASKS, TrainSpec
from workflow.paper.configuration import RowConfig, Scale, TaskConfig, merge
from workflow.paper.microbench import MEASURES

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
    recipe: str | None = None
    """What differs from the recipe of the scale."""
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


class TaskAtScale:
    """What a scale says of a task, checked.

    Raises:
        ValueError: the scale lacks the task, or model, data and detector do not fit together.
    """

    def __init__(self, task: str, scale: Scale, root: Path | None, variant: str | None = None) -> None:
        if task not in scale.config.tasks:
            raise ValueError(f"{scale.source}: tasks has no {task}; it has {', '.join(scale.config.tasks)}")
        self.task, self.config, self.source = TASKS[task], scale.config.tasks[task], f"{scale.source}: tasks.{task}"
        if variant is not None:
            if variant not in (known := self.config.variants):
                raise ValueError(f"{self.source}.variants has no {variant!r}; it has {', '.join(known) or 'none'}")
            self.source += f" with variants.{variant}"
            self.config = check(TaskConfig, merge(self.config.model_dump(), known[variant]), self.source)
        self.public = None if root else self.config.data.get("public")
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
        values = {key: value for key, value in self.config.data.items() if key not in ("root", "public")}
        if values.get("num_classes", 0) is None and self.public:
            values["num_classes"] = PUBLIC[self.public][self.task.layout]
        elif values.get("num_classes", 0) is None:
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

    def __init__(
        self,
        scale: Scale,
        paper: Scale,
        seeds: tuple[int, ...],
        roots: Mapping[str, Path | None],
        every_row: bool,
    ) -> None:
        self.scale, self.paper, self.seeds, self.results = scale, paper, seeds, f"results/{scale.name}"
        self.given, self.every_row = roots, every_row
        self.runs: dict[str, TrainSpec] = {}
        self.benches: dict[str, BenchSpec] = {}
        self.microbenches: dict[str, Spec] = {}
        self.names: dict[str, str] = {}
        self.tasks: dict[str, TaskAtScale] = {}  # variants have keys of their own, here and in the next two
        self.measured: dict[str, TaskAtScale] = {}
        self.inits: dict[str, str] = {}
        self.roots: dict[str, Path | None] = {}
        self.pretrains: dict[str, TrainSpec] = {}
        self.shipped: dict[str, str] = {}

    def open(self, task: str, variant: str | None = None) -> TaskAtScale:
        """Read what the scale says of a task, or of a variant of it. Rows need it."""
        if (key := _key(task, variant)) in self.tasks:
            return self.tasks[key]
        root = self.roots[task] = find_root(task, self.scale, self.given)
        own = measured = self.tasks[key] = TaskAtScale(task, self.scale, root, variant)
        if own.config.bench.model == "paper":
            measured = TaskAtScale(task, self.paper, root, variant)
        self.measured[key], self.inits[key] = measured, "timm"
        if (pretrain := own.config.pretrain) is not None:
            # Tasks whose hosts are equal, and that learn the same first, get one specification, so one run.
            donor, model = self.open(pretrain.task or task), own.model(UNPRUNED, pretrained=True)
            spec = self._train(donor, pretrain.recipe, UNPRUNED, PruneSpec(), "random")
            data = spec.data.model_copy(update={"image_size": own.data.image_size})
            spec = spec.model_copy(update={"model": model, "data": data})
            init = self._keep(self.pretrains, pretrain.task or task, spec)
            if pretrain.then is not None:
                heads = self._train(own, pretrain.then, UNPRUNED, PruneSpec(), init)
                init = self._keep(self.pretrains, task, heads)
            self.inits[key] = init
            if pretrain.shipped:
                self.shipped[init] = pretrain.shipped
        return own

    def row(
        self,
        where: str,
        name: str,
        listed: RowConfig,
        meant: RowConfig,
        others: Mapping[str, RowConfig],
        task: str,
        needs: Collection[str],
    ) -> Row:
        """Resolve a row.

        Args:
            where: file and row, for error messages.
            name: ``artefact/row``.
            listed: the row itself, which gives name and label.
            meant: the row that says what is run: another one if ``use`` names it.
            others: ``start`` and ``teacher``, the rows whose weights it needs, if it names any.
            task: of its artefact.
            needs: what its artefact reads.

        Raises:
            ValueError: a name that does not exist, or a schedule that does not fit.
        """
        own, key = self.open(task, meant.variant), _key(task, meant.variant)
        measured, init = self.measured[key], self.inits[key]
        schedule, why = own.schedule(where, meant), None
        if meant.reducer not in REDUCERS:
            raise ValueError(f"{where}: reducer = {meant.reducer!r} is unknown; choose one of {', '.join(REDUCERS)}")
        if (listed.use or name) in self.scale.config.leave_out:
            why = f"left out at the {self.scale.name} scale"
        run, bench, settings = None, None, own.config.bench
        several = (meant.repeat or self.every_row) and "maps" not in needs  # maps are drawn of the first seed alone
        seeds = self.seeds if several else self.seeds[:1]
        if why is None:
            ids = {key: self._run(where, getattr(meant, key), row, own, init) for key, row in others.items()}
            run = self._run(where, name, meant, own, ids.get("start", init), ids.get("teacher"))
            if "bench" in needs and (settings.rows is None or listed.row in settings.rows):
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
            options=_text(meant.options),
            recipe=_text(meant.recipe),
            paper_schedule=measured.schedule(where, meant).describe() if settings.model == "paper" else None,
            why=why,
            run=run,
            records=tuple(f"{self.results}/runs/{run}/seed{seed}/record.json" for seed in seeds) if run else (),
            bench=f"{self.results}/bench/{bench}/record.json" if bench else None,
            maps=f"{self.results}/maps/{run}/seed{self.seeds[0]}.npz" if run and "maps" in needs else None,
        )

    def microbench(self, where: str, name: str, row: RowConfig) -> Row:
        """Resolve a row that is a microbenchmark or a plan.

        Raises:
            ValueError: no such measurement, or settings that it does not have.
        """
        if name in self.scale.config.leave_out:
            return Row(row=row.row, label=row.label, why=f"left out at the {self.scale.name} scale")
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

    def _run(
        self, where: str, name: str, row: RowConfig, own: TaskAtScale, init: str, teacher: str | None = None
    ) -> str:
        """Add the training run of a row; its id."""
        prune = _prune(where, row, own.schedule(where, row))
        recipe = check(RecipeSpec, own.config.recipe.model_dump() | row.recipe, f"{where}: recipe")
        spec = self._train(own, recipe, row, prune, init)
        return self._keep(self.runs, name, spec.model_copy(update={"teacher": teacher}) if teacher else spec)

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


def _key(task: str, variant: str | None) -> str:
    return task if variant is None else f"{task}, {variant}"


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


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
    if (public := data.get("public")) is not None and TASKS[task].layout not in PUBLIC.get(public, ()):
        choices = ", ".join(name for name, layouts in PUBLIC.items() if TASKS[task].layout in layouts)
        raise ValueError(f"{source}.public = {public!r}: choose one of {choices}")
    if (key := data.get("root")) is None:
        if data.get("scenes") is None and public is None:
            raise ValueError(f"{source}: give scenes (generated), public (downloaded) or root ({', '.join(roots)})")
        return None
    if key not in roots:
        raise ValueError(f"{source}.root = {key!r}: choose one of {', '.join(roots)}")
    root, needed = roots[key], f"a folder with {', '.join(folders)}"
    if root is None and public is not None:
        return None
    if root is None:
        raise ValueError(f"config/config.yaml: {key} = null, but this scale reads {needed}: --config {key}=/path/to/it")
    for name in folders:
        if not (root / name).is_dir():
            raise FileNotFoundError(
                f"config/config.yaml: {key} = {root}: {root / name} is missing; {key} names {needed}"
            )
    return root
