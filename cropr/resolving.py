"""A row of the grid and a scale -> the specs of its runs. Used by ``cropr.experiments`` alone.

Pure Python and pydantic, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cropr.configuration import ModelBlock, RowConfig, ScaleConfig
from cropr.schedule import Schedule
from cropr.specs import REDUCERS, BenchSpec, DataSpec, ModelSpec, PruneSpec, RecipeSpec, TrainSpec

TRAINING_ONLY = frozenset(
    {"num_queries", "num_heads", "qkv_proj", "mlp", "mlp_ratio", "selector", "stop_gradient"},
)
"""Options that deployment folds into one vector or drops: models that differ in these alone run equally fast, so they
share a measurement. (The norm stays: it scales every token.)"""


@dataclass(frozen=True, slots=True)
class Row:
    """A row with the runs that it needs at this scale."""

    row: str
    label: str
    columns: dict[str, Any]
    """What distinguishes it, for tables: reducer, schedule, fusion, pool, image size, options."""
    why: str | None
    """Why it cannot run; None for a row that can."""
    run: str | None
    bench: str | None

    @property
    def available(self) -> bool:
        """Whether its reducer exists."""
        return self.why is None


class Resolver:
    """Rows to specs. Collects the runs and measurements on the way."""

    def __init__(
        self, scale: ScaleConfig, source: str, bench: ScaleConfig, bench_source: str, root: Path | None
    ) -> None:
        self.scale, self.source = scale, source
        self.bench_scale, self.bench_source = bench, bench_source
        self.data = self._data(root)
        self.pretrain = None
        if scale.pretrain is not None:
            unpruned = RowConfig(row="pretrain", label="")
            self.pretrain = self._train(scale.pretrain.recipe, unpruned, PruneSpec(), "random")
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
        schedule = self._schedule(where, meant, self.scale, self.source)
        if meant.reducer not in REDUCERS:
            if meant.why is None:
                raise ValueError(
                    f"{where}: reducer = {meant.reducer!r} is unknown; choose one of {', '.join(REDUCERS)}, "
                    f"or say why it is not there yet (key why)"
                )
            return Row(listed.row, listed.label, self._columns(meant, schedule), meant.why, None, None)
        prune = self._prune(where, meant, schedule)
        train = self._train(self.scale.recipe, meant, prune, self.init)
        run = train.digest()
        self.runs[run] = train
        self.names.setdefault(run, name)
        bench = None
        if "bench" in needs:
            spec = self._bench(where, meant, prune)
            bench = spec.digest()
            self.benches[bench] = spec
            self.names.setdefault(bench, name)
        return Row(listed.row, listed.label, self._columns(meant, schedule), None, run, bench)

    def _train(self, recipe: RecipeSpec, row: RowConfig, prune: PruneSpec, init: str) -> TrainSpec:
        model = self.scale.model
        size = self.scale.image_sizes[row.image_size] if row.image_size else self.data.image_size
        return TrainSpec(
            model=ModelSpec(name=model.name, args=model.args | model.pools[row.pool], drop_path=model.drop_path),
            prune=prune,
            data=self.data.model_copy(update={"image_size": size}),
            recipe=recipe,
            init=init,
        )

    def _bench(self, where: str, row: RowConfig, prune: PruneSpec) -> BenchSpec:
        """The measurement of a row: its inference form, on the model of the bench, without trained weights."""
        schedule = self._schedule(where, row, self.bench_scale, self.bench_source)
        model, settings = self.bench_scale.model, self.scale.bench
        options = {name: value for name, value in prune.options.items() if name not in TRAINING_ONLY}
        return BenchSpec(
            model=ModelSpec(name=model.name.partition(".")[0], args=model.args | model.pools[row.pool]),
            prune=PruneSpec(reducer=row.reducer, options=options, schedule=schedule.to_config(), fusion=row.fusion),
            image_size=self.bench_scale.data.image_size,
            pruned_image_size=self.bench_scale.image_sizes[row.image_size] if row.image_size else None,
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

    def _schedule(self, where: str, row: RowConfig, scale: ScaleConfig, source: str) -> Schedule:
        """The schedule that a row names, checked against model and image size of a scale."""
        if row.pool not in scale.model.pools:
            raise ValueError(
                f"{where}: pool = {row.pool!r}: {source} has {', '.join(scale.model.pools)} in model.pools"
            )
        if row.image_size is not None and row.image_size not in scale.image_sizes:
            raise ValueError(
                f"{where}: image_size = {row.image_size!r}: {source} has "
                f"{', '.join(scale.image_sizes) or 'none'} in image_sizes"
            )
        size = scale.image_sizes[row.image_size] if row.image_size else scale.data.image_size
        if row.schedule == "none":
            schedule = Schedule.constant(0)
        elif row.schedule in scale.schedules:
            key = f"{source}: schedules.{row.schedule} = {scale.schedules[row.schedule]}"
            try:
                schedule = Schedule.from_config(scale.schedules[row.schedule])
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{key}: {error}") from None
        else:
            known = ", ".join(["none", *scale.schedules])
            raise ValueError(f"{where}: schedule = {row.schedule!r}: {source} has {known} in schedules")
        if row.reducer == "none" and row.schedule != "none":
            reducers = ", ".join(name for name in REDUCERS if name != "none")
            raise ValueError(f"{where}: schedule = {row.schedule!r} without a reducer; choose one of {reducers}")
        model = scale.model
        if size % model.patch_size:
            raise ValueError(f"{source}: image size {size} is no multiple of model.patch_size = {model.patch_size}")
        try:
            schedule.resolve(_patches(model, size), model.depth, row.fusion == "llf", model.prefix)
        except ValueError as error:
            raise ValueError(f"{key}: {error} (needed by {where})") from None
        return schedule

    def _columns(self, row: RowConfig, schedule: Schedule) -> dict[str, Any]:
        return {
            "reducer": row.reducer,
            "schedule": _describe(schedule),
            "fusion": row.fusion,
            "pool": row.pool,
            "image_size": self.scale.image_sizes[row.image_size] if row.image_size else self.data.image_size,
            "aux_weight": row.aux_weight,
            "options": ", ".join(f"{name}={value}" for name, value in row.options.items()),
        }

    def _data(self, root: Path | None) -> DataSpec:
        values = self.scale.data.model_dump(exclude={"root", "num_classes"})
        classes = self.scale.data.num_classes
        if classes is None:
            if root is None:
                raise ValueError(f"{self.source}: data.num_classes is missing")
            classes = sum(entry.is_dir() for entry in (root / "train").iterdir())
            if classes < 2:
                raise ValueError(f"{root / 'train'} has {classes} class folders; it needs two or more")
        return DataSpec(num_classes=classes, **values)


def _patches(model: ModelBlock, image_size: int) -> int:
    return (image_size // model.patch_size) ** 2


def _describe(schedule: Schedule) -> str:
    """A schedule as the paper writes it: ``R=8``, ``R=50 @ 6,12,18``, ``80% @ 3``."""
    if schedule.rule == "constant":
        return f"R={schedule.rate}" if schedule.rate else "none"
    blocks = ",".join(str(block) for block, _ in schedule.at)
    numbers = [f"{number:.0%}" if schedule.rule == "fraction" else f"{number:g}" for _, number in schedule.at]
    text = numbers[0] if len(set(numbers)) == 1 else ",".join(numbers)
    return {"stages": f"R={text}", "fraction": text, "kept": f"K={text}"}[schedule.rule] + f" @ {blocks}"
