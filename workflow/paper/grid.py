"""The grid: which jobs a table or figure needs, and the specification of each.

An artefact (``config/experiments/*.yaml``) lists its rows for every scale; a scale (``config/scales/*.yaml``) says what
the names in them mean. Together they give every row a ``TrainSpec`` and a ``BenchSpec``, whose digests name the jobs:
two rows that ask for the same share it. Everything is checked here, before any job starts. No torch: Snakemake builds
its DAG from this.

    grid = load_grid("config", scale="laptop", seeds=3)
    grid.runs["1a2b3c4d5e"]                 # TrainSpec
    grid.manifest("imagenet_methods")       # what the notebook reads
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cropr.bench.specs import MEASURES, BenchSpec, PlanSpec
from cropr.pruning.methods import REDUCERS
from cropr.pruning.schedule import Schedule
from cropr.specs import PruneSpec, RecipeSpec, ScenesSpec, Spec, check
from cropr.tasks import TASKS, TrainSpec
from workflow.paper.configuration import (
    ArtefactConfig,
    Row,
    RowConfig,
    Scale,
    ScaleConfig,
    TaskAtScale,
    find_root,
    merge,
    parse_seeds,
    read_artefacts,
    read_scale,
)

UNPRUNED = RowConfig(row="none", label="")


@dataclass(frozen=True, slots=True)
class Artefact:
    """A table or figure with its rows at a scale."""

    name: str
    config: ArtefactConfig
    published: str | None
    """File of published numbers, relative to the repository."""
    rows: tuple[Row, ...]

    def __getitem__(self, row: str) -> Row:
        return {candidate.row: candidate for candidate in self.rows}[row]


@dataclass(frozen=True, slots=True)
class Source:
    """Images and first weights of a task."""

    folder: str
    """The images: the user's folder, or one under ``results``."""
    layout: str
    scenes: ScenesSpec | None
    """The images to generate; None: they are the user's."""
    pretrain: TrainSpec | None
    """Makes the weights that every run of the task starts from; None if timm has them."""
    shipped: str | None
    """Weights file in the repository that may replace ``pretrain``."""


@dataclass(frozen=True)
class Grid:
    """All that the workflow runs at one scale."""

    scale: str
    config: ScaleConfig
    seeds: tuple[int, ...]
    artefacts: dict[str, Artefact]
    """In the order in which they are computed and read."""
    runs: dict[str, TrainSpec]
    """Fine-tuning runs by id."""
    benches: dict[str, BenchSpec]
    microbenches: dict[str, Spec]
    """Microbenchmarks and plans by id."""
    sources: dict[str, Source]
    """By task."""
    names: dict[str, str]
    """Id -> the first ``artefact/row`` that asks for it."""
    lacking: tuple[str, ...] = ()
    """Tasks whose artefacts are left out because the folder of their images is not given."""

    @property
    def results(self) -> str:
        """Folder of everything that this scale makes."""
        return f"results/{self.scale}"

    @property
    def generated(self) -> dict[str, ScenesSpec]:
        """Layout -> the images to generate in it."""
        return {source.layout: source.scenes for source in self.sources.values() if source.scenes}

    @property
    def pretrains(self) -> dict[str, Source]:
        """Runs that make first weights, by id, with the task's source."""
        return {source.pretrain.digest(): source for source in self.sources.values() if source.pretrain}

    def source(self, run: str) -> Source:
        """Images and first weights of a run, by its id."""
        return self.sources[self.runs[run].task] if run in self.runs else self.pretrains[run]

    def files(self, artefact: str) -> list[str]:
        """Every file that a notebook reads, each once."""
        rows = self.artefacts[artefact].rows
        found = [file for row in rows for file in (*row.records, row.bench, row.maps) if file]
        return list(dict.fromkeys(found))

    def manifest(self, artefact: str) -> dict[str, Any]:
        """All that a notebook is told: the artefact, and its rows with the paths of their records."""
        config = self.artefacts[artefact].config
        return {
            "artefact": artefact,
            **config.model_dump(include={"title", "question", "section", "order", "task", "baseline", "paper_model"}),
            "scale": self.scale,
            "seeds": list(self.seeds),
            "results": self.results,
            "published": self.artefacts[artefact].published,
            "metrics": {} if config.is_microbench else dict(TASKS[config.task].metrics),
            "rows": [asdict(row) for row in self.artefacts[artefact].rows],
        }

    def priority(self, job: str) -> int:
        """Greater for runs, first weights (both by id) and images (by layout) that an earlier artefact waits for."""

        def needs(run: str) -> tuple[str, ...]:
            source = self.source(run)
            return (run, source.layout, *([source.pretrain.digest()] if source.pretrain else []))

        ranked = enumerate(reversed(self.artefacts.values()), start=1)
        return max((rank for rank, a in ranked if any(row.run and job in needs(row.run) for row in a.rows)), default=0)

    def comparable(self) -> list[str]:
        """``artefact/row`` of every row that runs and has a baseline."""
        return [
            f"{artefact.name}/{row.row}"
            for artefact in self.artefacts.values()
            for row in artefact.rows
            if artefact.config.baseline not in (None, row.row) and row.run
        ]

    def find_row(self, row: str) -> tuple[str, str]:
        """Artefact and name of a comparable row, given as ``artefact/row``, or as ``row`` if one artefact has it.

        Raises:
            ValueError: no such row, or several; the message lists the rows.
        """
        found = [name for name in self.comparable() if row in (name, name.partition("/")[2])]
        if len(found) != 1:
            problem = f"this may be {' or '.join(found)}" if found else "no such row to compare"
            raise ValueError(f"row = {row!r}: {problem}; choose one of {', '.join(self.comparable())}")
        artefact, _, name = found[0].partition("/")
        return artefact, name


def load_grid(
    config: str | Path,
    scale: str = "laptop",
    seeds: int | str | Iterable[int | str] | None = None,
    roots: Mapping[str, Path | None] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Grid:
    """Read and check everything under ``config`` for one scale.

    Args:
        config: folder with ``scales/``, ``experiments/`` and ``published/``.
        scale: name of a file in ``scales/``.
        seeds: as ``parse_seeds`` reads them; None: the scale's.
        roots: the user's folders by the key that a scale's ``data.root`` names. Tasks without theirs are left out, if
            another task remains.
        overrides: laid over the scale's file.

    Raises:
        ValueError: unknown key, reducer or row, impossible schedule, data root not given: file, key, value, fix.
        FileNotFoundError: no such scale; or a data root without the folders that it needs.
    """
    folder, given = Path(config), roots or {}
    own, paper = read_scale(folder, scale, overrides), read_scale(folder, "paper")
    chosen_seeds = parse_seeds(own.config.seeds if seeds is None else seeds)
    artefacts = read_artefacts(folder, own.config)
    needed = tuple(dict.fromkeys(artefact.task for artefact in artefacts.values() if not artefact.is_microbench))
    lacking = tuple(task for task in needed if _folder_missing(own.config, task, given))
    if lacking == needed:  # nothing would remain: the first of them says what is missing
        lacking = ()
    resolver = Resolver(own, paper, chosen_seeds, given)
    for task in needed:
        if task not in lacking:
            resolver.open(task)
    resolved = {}
    for name, artefact in artefacts.items():
        if rows := _rows(folder, name, artefacts, resolver):
            published = folder / "published" / f"{name}.csv"
            resolved[name] = Artefact(name, artefact, str(published) if published.is_file() else None, rows)
    _verify_names(own, resolved, resolver)
    return Grid(
        scale=scale,
        config=own.config,
        seeds=chosen_seeds,
        artefacts=resolved,
        runs=resolver.runs,
        benches=resolver.benches,
        microbenches=resolver.microbenches,
        sources={task: _source(task, resolver) for task in resolver.tasks},
        names=resolver.names,
        lacking=lacking,
    )


def _folder_missing(scale: ScaleConfig, task: str, roots: Mapping[str, Path | None]) -> bool:
    """Whether a folder of the user's is needed and not given; a key that does not exist is refused later."""
    key = scale.tasks[task].data.get("root")
    return key is not None and roots.get(key, Path()) is None


def _rows(folder: Path, name: str, artefacts: Mapping[str, ArtefactConfig], resolver: Resolver) -> tuple[Row, ...]:
    """Rows of an artefact; none if its images or a truth that it needs are missing, or if it has none at this scale."""
    file, artefact = folder / "experiments" / f"{name}.yaml", artefacts[name]
    if artefact.is_microbench:
        here = [row for row in artefact.rows if row.scales is None or resolver.scale.name in row.scales]
        return tuple(resolver.microbench(f"{file}: row {row.row}", f"{name}/{row.row}", row) for row in here)
    task = resolver.tasks.get(artefact.task)
    if task is None or ("truth" in artefact.needs and task.data.scenes is None):
        return ()
    rows = []
    for row in artefact.rows:
        where = f"{file}: row {row.row}"
        meant = _used(where, row, {key: other for key, other in artefacts.items() if other.task == artefact.task})
        rows.append(resolver.row(where, f"{name}/{row.row}", row, meant, artefact.task, artefact.needs))
    return tuple(rows)


def _used(where: str, row: RowConfig, artefacts: Mapping[str, ArtefactConfig]) -> RowConfig:
    """The row that ``use`` names, or the row itself."""
    if row.use is None:
        return row
    if extra := sorted(row.model_fields_set - {"row", "label", "use"}):
        raise ValueError(f"{where}: {', '.join(extra)} cannot be given with use; drop one of them")
    places = {f"{name}/{r.row}": r for name, config in artefacts.items() for r in config.rows if r.use is None}
    if row.use not in places:
        raise ValueError(f"{where}: use = {row.use!r} is no row; choose one of {', '.join(places)}")
    return places[row.use]


def _verify_names(scale: Scale, artefacts: Mapping[str, Artefact], resolver: Resolver) -> None:
    """Refuse settings of rows that do not exist: ``microbench`` and ``bench.rows`` of a scale."""
    known = {
        name
        for one in artefacts.values()
        if one.config.is_microbench
        for name in (one.name, *(f"{one.name}/{row.row}" for row in one.rows))
    }
    if unknown := sorted(set(scale.config.microbench) - known):
        choices = ", ".join(sorted(known))
        raise ValueError(f"{scale.source}: microbench.{unknown[0]}: no such microbenchmark; there are {choices}")
    for task in resolver.tasks:
        tables = [one for one in artefacts.values() if one.config.task == task and "bench" in one.config.needs]
        rows = {row.row for table in tables for row in table.rows}
        if tables and (unknown := sorted(set(scale.config.tasks[task].bench.rows or ()) - rows)):
            choices = ", ".join(sorted(rows))
            raise ValueError(f"{scale.source}: tasks.{task}.bench.rows: no row {unknown[0]!r}; choose among {choices}")


def _source(task: str, resolver: Resolver) -> Source:
    layout, root, own = TASKS[task].layout, resolver.roots[task], resolver.tasks[task]
    return Source(
        folder=str(root or f"{resolver.results}/data/{layout}"),
        layout=layout,
        scenes=None if root else own.data.scenes,
        pretrain=resolver.pretrains.get(task),
        shipped=own.config.pretrain.shipped if own.config.pretrain else None,
    )


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
