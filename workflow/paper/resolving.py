"""A row of the grid and a scale -> the specs of its runs. Used by ``workflow.paper.grid`` alone.

Pure Python and pydantic, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cropr.bench.specs import MEASURES, BenchSpec, PlanSpec
from cropr.bench.specs import MicrobenchSpec as LabSpec
from cropr.pruning.methods import REDUCERS, before_last_block
from cropr.pruning.schedule import Schedule, attended
from cropr.specs import ImagesSpec, ModelSpec, PruneSpec, RecipeSpec
from cropr.tasks import TASKS
from cropr.tasks.detection import DetModelSpec
from cropr.training.specs import TrainSpec
from workflow.paper.configuration import ArtefactConfig, ModelBlock, RowConfig, ScaleConfig, TaskConfig, check, merge


@dataclass(frozen=True, slots=True)
class Row:
    """A row with the runs that it needs at this scale."""

    row: str
    label: str
    columns: dict[str, Any]
    """What distinguishes it, for tables: reducer, schedule, fusion, pool, image size, options."""
    why: str | None
    """Why it cannot run; None for a row that can."""
    run: str | None = None
    bench: str | None = None
    lab: str | None = None
    """Measurement of the laboratory; such a row has nothing else."""

    @property
    def available(self) -> bool:
        """Whether its reducer exists."""
        return self.why is None


@dataclass(frozen=True, slots=True)
class Scale:
    """A scale, its name, and the file that it comes from, for error messages."""

    name: str
    config: ScaleConfig
    source: str

    def task(self, task: str) -> tuple[TaskConfig, str]:
        """What the scale says of a task, and where.

        Raises:
            ValueError: nothing.
        """
        if task not in self.config.tasks:
            raise ValueError(f"{self.source}: tasks has no {task}; it has {', '.join(self.config.tasks)}")
        return self.config.tasks[task], f"{self.source}: tasks.{task}"


class Resolver:
    """Rows of one task to specs. Collects the runs and measurements on the way."""

    def __init__(self, task: str, scale: Scale, measured: Scale, roots: Mapping[str, Path | None]) -> None:
        self.task, self.scale = task, scale.name
        self.config, self.source = scale.task(task)
        self.root = find_root(task, self.config, self.source, roots)
        self.bench_config, self.bench_source = measured.task(task)
        self.settings = self.config.bench
        self.data = self._data(self.config, self.source)
        self.bench_data = self._data(self.bench_config, self.bench_source)
        self.detector = _detector(task, self.config, self.source)
        self.bench_detector = _detector(task, self.bench_config, self.bench_source)
        self.pretrain = None
        if self.config.pretrain is not None:
            unpruned = RowConfig(row="pretrain", label="")
            self.pretrain = self._train(self.config.pretrain.recipe, unpruned, PruneSpec(), "random")
        self.init = self.pretrain.digest() if self.pretrain else "timm"
        self.runs: dict[str, TrainSpec] = {}
        self.benches: dict[str, BenchSpec] = {}
        self.names: dict[str, str] = {}

    def row(self, file: str, name: str, listed: RowConfig, meant: RowConfig, needs: Iterable[str]) -> Row:
        """Resolve one row.

        Args:
            file: where it is listed, for error messages.
            name: ``artefact/row``.
            listed: the row itself, which gives name and label.
            meant: the row that says what is run: another where ``use`` names it.
            needs: what its artefact reads.
        """
        where = f"{file}: row {listed.row}"
        schedule = self._schedule(where, meant, self.config, self.data.image_size, self.source)
        if meant.reducer not in REDUCERS:
            if meant.why is None:
                raise ValueError(
                    f"{where}: reducer = {meant.reducer!r} is unknown; choose one of {', '.join(REDUCERS)}, "
                    f"or say why it is not there yet (key why)"
                )
            return Row(listed.row, listed.label, self._columns(where, meant, schedule), meant.why)
        if meant.scales is not None and self.scale not in meant.scales:
            columns = self._columns(where, meant, schedule)
            return Row(listed.row, listed.label, columns, f"left out at the {self.scale} scale")
        prune = self._prune(where, meant, schedule)
        train = self._train(self.config.recipe, meant, prune, self.init)
        run = train.digest()
        self.runs[run] = train
        self.names.setdefault(run, name)
        bench = None
        if "bench" in needs and listed.row in (self.settings.rows or [listed.row]):
            spec = self._bench(where, meant, prune)
            bench = spec.digest()
            self.benches[bench] = spec
            self.names.setdefault(bench, name)
        return Row(listed.row, listed.label, self._columns(where, meant, schedule), None, run, bench)

    def _train(self, recipe: RecipeSpec, row: RowConfig, prune: PruneSpec, init: str) -> TrainSpec:
        model = self.config.model
        size = self.config.image_sizes[row.image_size] if row.image_size else self.data.image_size
        return TrainSpec(
            task=self.task,
            model=ModelSpec(name=model.name, args=model.args | model.pools[row.pool], drop_path=model.drop_path),
            prune=prune,
            data=self.data.model_copy(update={"image_size": size}),
            detector=self.detector,
            recipe=recipe,
            init=init,
        )

    def _bench(self, where: str, row: RowConfig, prune: PruneSpec) -> BenchSpec:
        """The measurement of a row: its inference form, on the model of the bench, without trained weights."""
        schedule = self._schedule(where, row, self.bench_config, self.bench_data.image_size, self.bench_source)
        model, settings = self.bench_config.model, self.settings
        options = {
            name: value for name, value in prune.options.items() if name not in REDUCERS[row.reducer].training_only
        }
        return BenchSpec(
            model=ModelSpec(name=model.name.partition(".")[0], args=model.args | model.pools[row.pool]),
            prune=PruneSpec(reducer=row.reducer, options=options, schedule=schedule.to_config(), fusion=row.fusion),
            detector=self.bench_detector,
            image_size=self.bench_data.image_size,
            pruned_image_size=self.bench_config.image_sizes[row.image_size] if row.image_size else None,
            batch_size=settings.batch_size,
            precision=settings.precision,
            rounds=settings.rounds,
            warmup=settings.warmup,
        )

    def _prune(self, where: str, row: RowConfig, schedule: Schedule) -> PruneSpec:
        try:
            return PruneSpec(
                reducer=row.reducer,
                options=row.options,
                schedule=schedule.to_config(),
                fusion=row.fusion,
                aux_weight=row.aux_weight,
            )
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"{where}: options = {row.options}: {problem}") from None

    def _schedule(self, where: str, row: RowConfig, config: TaskConfig, image_size: int, source: str) -> Schedule:
        """The schedule that a row names, checked against the model and the image size of a task."""
        if row.pool not in config.model.pools:
            raise ValueError(
                f"{where}: pool = {row.pool!r}: {source} has {', '.join(config.model.pools)} in model.pools"
            )
        if row.image_size is not None and row.image_size not in config.image_sizes:
            raise ValueError(
                f"{where}: image_size = {row.image_size!r}: {source} has "
                f"{', '.join(config.image_sizes) or 'none'} in image_sizes"
            )
        size = config.image_sizes[row.image_size] if row.image_size else image_size
        if row.schedule == "none":
            schedule = Schedule.constant(0)
        elif row.schedule in config.schedules:
            key = f"{source}.schedules.{row.schedule} = {config.schedules[row.schedule]}"
            try:
                schedule = Schedule.from_config(config.schedules[row.schedule])
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{key}: {error}") from None
        else:
            known = ", ".join(["none", *config.schedules])
            raise ValueError(f"{where}: schedule = {row.schedule!r}: {source} has {known} in schedules")
        if row.reducer == "none" and row.schedule != "none":
            reducers = ", ".join(name for name in REDUCERS if name != "none")
            raise ValueError(f"{where}: schedule = {row.schedule!r} without a reducer; choose one of {reducers}")
        model = config.model
        if size % model.patch_size:
            raise ValueError(f"{source}: image size {size} is no multiple of model.patch_size = {model.patch_size}")
        detector = _detector(self.task, config, source)
        if detector is not None and size % (step := model.patch_size * detector.window):
            raise ValueError(
                f"{source}: image size {size} holds no whole windows of {detector.window} x {detector.window} patches: "
                f"make it a multiple of {step}, or change detector.window"
            )
        patches, fused = _patches(model, size), before_last_block(row.fusion)
        try:
            counts = schedule.resolve(patches, model.depth, fused, model.prefix)
            if detector is not None:
                _verify_windows(attended(counts, patches, fused), detector)
        except ValueError as error:
            raise ValueError(f"{key}: {error} (needed by {where})") from None
        return schedule

    def _columns(self, where: str, row: RowConfig, schedule: Schedule) -> dict[str, Any]:
        return {
            "reducer": row.reducer,
            "schedule": schedule.describe(),
            "fusion": row.fusion,
            "pool": row.pool,
            "image_size": self.config.image_sizes[row.image_size] if row.image_size else self.data.image_size,
            "aux_weight": row.aux_weight,
            "options": ", ".join(f"{name}={value}" for name, value in row.options.items()),
            **self._paper_schedule(where, row),
        }

    def _paper_schedule(self, where: str, row: RowConfig) -> dict[str, str]:
        """The schedule of the paper's model, where that is the one that is measured."""
        if self.settings.model != "paper":
            return {}
        schedule = self._schedule(where, row, self.bench_config, self.bench_data.image_size, self.bench_source)
        return {"paper_schedule": schedule.describe()}

    def _data(self, config: TaskConfig, source: str) -> ImagesSpec:
        values = {key: value for key, value in config.data.items() if key != "root"}
        if "num_classes" in values and values["num_classes"] is None:
            if self.root is None or self.task != "classification":
                raise ValueError(f"{source}.data.num_classes is missing; only class folders of yours are counted")
            classes = values["num_classes"] = sum(entry.is_dir() for entry in (self.root / "train").iterdir())
            if classes < 2:
                raise ValueError(f"{self.root / 'train'} has {classes} class folders; it needs two or more")
        return check(TASKS[self.task].data, values, f"{source}.data")


def _patches(model: ModelBlock, image_size: int) -> int:
    return (image_size // model.patch_size) ** 2


def _detector(task: str, config: TaskConfig, source: str) -> DetModelSpec | None:
    """Windows and heads of a detector; None for another task.

    Raises:
        ValueError: another task has such a block, or its blocks are not the encoder's.
    """
    if task != "detection":
        if config.detector is not None:
            raise ValueError(f"{source}.detector: {task} has no detector; only tasks.detection has this block")
        return None
    detector, depth = config.detector or DetModelSpec(), config.model.depth
    blocks = detector.global_blocks
    if depth not in blocks or min(blocks) < 1 or max(blocks) > depth:
        raise ValueError(
            f"{source}.detector.global_blocks = {list(blocks)}: blocks count from 1 to model.depth = {depth}, and the "
            "last must be among them"
        )
    return detector


def _verify_windows(entering: Iterable[int], detector: DetModelSpec) -> None:
    """Refuse patch counts that windows cannot hold, as the model itself would when it is built.

    Raises:
        ValueError: count, block, and the multiple that it must be.
    """
    size = detector.window**2
    for block, count in enumerate(entering, start=1):
        if block not in detector.global_blocks and count % size:
            raise ValueError(f"{count} patches enter block {block}, whose windows need a multiple of {size}")


def find_root(task: str, config: TaskConfig, source: str, roots: Mapping[str, Path | None]) -> Path | None:
    """The user's folder of a task, checked as far as a listing goes; None where images are generated.

    Raises:
        ValueError: neither generated nor named, or not given.
        FileNotFoundError: a folder without those that it needs.
    """
    key = config.data.get("root")
    if key is None:
        if config.data.get("scenes") is None:
            raise ValueError(f"{source}.data: give scenes (generated) or root (one of {', '.join(roots)})")
        return None
    if key not in roots:
        raise ValueError(f"{source}.data.root = {key!r}: choose one of {', '.join(roots)}")
    root = roots[key]
    needed = f"a folder with {', '.join(TASKS[task].folders)}"
    if root is None:
        raise ValueError(f"config/config.yaml: {key} = null, but this scale reads {needed}: --config {key}=/path/to/it")
    for name in TASKS[task].folders:
        if not (root / name).is_dir():
            raise FileNotFoundError(
                f"config/config.yaml: {key} = {root}: {root / name} is missing; {key} names {needed}"
            )
    return root


class Laboratory:
    """Rows that are measurements. Collects their specifications on the way."""

    def __init__(self, scale: str, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self.scale, self.settings = scale, settings
        self.specs: dict[str, LabSpec | PlanSpec] = {}
        self.names: dict[str, str] = {}

    def rows(self, file: Path, config: ArtefactConfig) -> Iterator[Row]:
        """The rows of an artefact that this scale has."""
        for row in config.rows:
            if row.scales is None or self.scale in row.scales:
                name = f"{file.stem}/{row.row}"
                spec = _lab_spec(str(file), name, row, self.settings)
                self.specs[spec.digest()] = spec
                self.names.setdefault(spec.digest(), name)
                yield Row(row.row, row.label, {}, None, lab=spec.digest())

    def verify(self, source: str) -> None:
        """Refuse settings of rows that do not exist."""
        known = {*self.names.values(), *(name.partition("/")[0] for name in self.names.values())}
        if unknown := sorted(set(self.settings) - known):
            raise ValueError(f"{source}: lab.{unknown[0]}: no such measurement; there are {', '.join(sorted(known))}")


def _lab_spec(file: str, name: str, row: RowConfig, lab: Mapping[str, Mapping[str, Any]]) -> LabSpec | PlanSpec:
    """What a row of the laboratory measures at a scale.

    Args:
        file: where the row is listed, for error messages.
        name: ``artefact/row``.
        lab: of the scale.

    Raises:
        ValueError: settings that the measurement does not have.
    """
    settings: Mapping[str, Any] = row.settings
    for key in (name.partition("/")[0], name):
        settings = merge(settings, lab.get(key, {}))
    if row.measure == "plan":
        return check(PlanSpec, settings, f"{file}: row {row.row}: settings")
    assert row.measure is not None
    return check(MEASURES[row.measure], {**settings, "measure": row.measure}, f"{file}: row {row.row}: settings")
