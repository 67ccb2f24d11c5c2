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

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cropr.bench.specs import BenchSpec
from cropr.specs import PUBLIC, ScenesSpec, Spec
from cropr.tasks import TASKS, TrainSpec
from workflow.paper.configuration import (
    ArtefactConfig,
    RowConfig,
    ScaleConfig,
    parse_seeds,
    read_artefacts,
    read_scale,
)
from workflow.paper.resolver import Resolver, Row


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
    """Images of a task."""

    folder: str
    """The user's folder, or one under ``results``."""
    layout: str
    scenes: ScenesSpec | None
    """The images to generate, if any."""
    public: str | None
    """The public set to download, if any; without either, they are the user's."""


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
    pretrains: dict[str, TrainSpec]
    """Runs that make the weights to start from, by id."""
    shipped: dict[str, str]
    """Id -> file in the repository that may replace the run that makes these weights."""
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
    def public(self) -> dict[str, list[str]]:
        """Public set -> the layouts that it is written in."""
        sets = sorted({source.public for source in self.sources.values() if source.public})
        return {name: list(PUBLIC[name]) for name in sets}

    def spec(self, run: str) -> TrainSpec:
        """A run, or one that makes weights, by id."""
        return self.runs.get(run) or self.pretrains[run]

    def source(self, run: str) -> Source:
        """Images of a run, by its id."""
        return self.sources[self.spec(run).task]

    def files(self, artefact: str) -> list[str]:
        """Every file that a notebook reads, its manifest aside, each once."""
        others = [name for name in self.artefacts[artefact].config.reads if name in self.artefacts]
        rows = [row for name in (artefact, *others) for row in self.artefacts[name].rows]
        found = [file for row in rows for file in (*row.records, row.bench, row.maps) if file]
        return list(dict.fromkeys([*found, *(f"{self.results}/manifests/{name}.json" for name in others)]))

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

    def priority(self, job: str, seed: int | None = None) -> int:
        """Greater for runs (of a seed), first weights (both by id) and images (by layout) that an earlier artefact
        waits for; pruning maps, for which a few runs are enough, come first. What runs wait for comes before what waits
        for nothing."""

        def needs(run: str) -> set[str]:
            chain = [run]
            for one in chain:  # grows meanwhile
                spec = self.spec(one)
                chain += [other for other in (spec.init, spec.teacher) if other in self.runs or other in self.pretrains]
            return {*chain, *(self.source(one).layout for one in chain)}

        def waits(row: Row) -> bool:
            return bool(row.run) and seed in (None, *self.seeds[: len(row.records)]) and job in needs(str(row.run))

        ordered = sorted(self.artefacts.values(), key=lambda artefact: "maps" not in artefact.config.needs)
        ranked = enumerate(reversed(ordered), start=1)
        rank = max((rank for rank, artefact in ranked if any(map(waits, artefact.rows))), default=0)
        return 2 * rank + (job not in self.runs)

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
        left = [f"{name}/{r.row}" for name, one in self.artefacts.items() for r in one.rows if r.why]
        if not found and (out := [name for name in left if row in (name, name.partition("/")[2])]):
            raise ValueError(f"row = {row!r}: {out[0]} is left out at this scale (leave_out); COMPLETE=1 may add it")
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
    artefacts = read_artefacts(folder, own)
    needed = tuple(dict.fromkeys(artefact.task for artefact in artefacts.values() if not artefact.is_microbench))
    lacking = tuple(task for task in needed if _folder_missing(own.config, task, given))
    if lacking == needed:  # nothing would remain: the first of them says what is missing
        lacking = ()
    resolver = Resolver(own, paper, chosen_seeds, given, every_row=seeds is not None)
    for task in needed:
        if task not in lacking:
            resolver.open(task)
    resolved = {}
    for name, artefact in artefacts.items():
        if unknown := [other for other in artefact.reads if not (folder / "experiments" / f"{other}.yaml").is_file()]:
            raise ValueError(f"{folder / 'experiments' / name}.yaml: reads: there is no artefact {unknown[0]!r}")
        if rows := _rows(folder, name, artefacts, resolver):
            published = folder / "published" / f"{name}.csv"
            resolved[name] = Artefact(name, artefact, str(published) if published.is_file() else None, rows)
    return Grid(
        scale=scale,
        config=own.config,
        seeds=chosen_seeds,
        artefacts=resolved,
        runs=resolver.runs,
        pretrains=resolver.pretrains,
        shipped=resolver.shipped,
        benches=resolver.benches,
        microbenches=resolver.microbenches,
        sources={task: _source(task, resolver) for task in resolver.roots},
        names=resolver.names,
        lacking=lacking,
    )


def _folder_missing(scale: ScaleConfig, task: str, roots: Mapping[str, Path | None]) -> bool:
    """Whether a folder of the user's is needed and not given; a key that does not exist is refused later. A public set
    replaces folders where none is given."""
    data = scale.tasks[task].data
    downloaded = "public" in data and not any(roots.values())
    return data.get("root") is not None and roots.get(data["root"], Path()) is None and not downloaded


def _rows(folder: Path, name: str, artefacts: Mapping[str, ArtefactConfig], resolver: Resolver) -> tuple[Row, ...]:
    """Rows of an artefact; none if its images or a truth that it needs are missing, or if it has none at this scale."""
    file, artefact = folder / "experiments" / f"{name}.yaml", artefacts[name]
    if artefact.is_microbench:
        found = tuple(resolver.microbench(f"{file}: row {row.row}", f"{name}/{row.row}", row) for row in artefact.rows)
        return found if any(row.bench for row in found) else ()
    task = resolver.tasks.get(artefact.task)
    if task is None or ("truth" in artefact.needs and not (task.data.scenes or task.public)):
        return ()
    rows = []
    for row in artefact.rows:
        where = f"{file}: row {row.row}"
        same = {key: other for key, other in artefacts.items() if other.task == artefact.task}
        meant = _used(where, row, same)
        named = {key: value for key in ("start", "teacher") if (value := getattr(meant, key)) is not None}
        others = {key: _find(f"{where}: {key}", value, same) for key, value in named.items()}
        for key, other in others.items():
            if other.start or other.teacher:
                raise ValueError(f"{where}: {key} = {named[key]!r} needs the weights of another row itself")
            if other.variant != meant.variant:
                raise ValueError(f"{where}: {key} = {named[key]!r} is of another variant: {other.variant or 'none'}")
        rows.append(resolver.row(where, f"{name}/{row.row}", row, meant, others, artefact.task, artefact.needs))
    if not any(row.run for row in rows):
        return ()
    if any(row.why and row.row == artefact.baseline for row in rows):
        raise ValueError(f"{resolver.scale.source}: leave_out: {name} needs its baseline {artefact.baseline!r}")
    return tuple(rows)


def _used(where: str, row: RowConfig, artefacts: Mapping[str, ArtefactConfig]) -> RowConfig:
    """The row that ``use`` names, or the row itself."""
    if row.use is None:
        return row
    if extra := sorted(row.model_fields_set - {"row", "label", "use"}):
        raise ValueError(f"{where}: {', '.join(extra)} cannot be given with use; drop one of them")
    return _find(f"{where}: use", row.use, artefacts)


def _find(where: str, name: str, artefacts: Mapping[str, ArtefactConfig]) -> RowConfig:
    """The row of that name, ``artefact/row``; ValueError, with those that there are, if there is none."""
    places = {f"{key}/{r.row}": r for key, config in artefacts.items() for r in config.rows if r.use is None}
    if name not in places:
        raise ValueError(f"{where} = {name!r} is no row; choose one of {', '.join(places)}")
    return places[name]


def _source(task: str, resolver: Resolver) -> Source:
    layout, root, own = TASKS[task].layout, resolver.roots[task], resolver.tasks[task]
    folder, scenes = str(root or f"{resolver.results}/data/{layout}"), None if root else own.data.scenes
    return Source(folder, layout, scenes, own.public)
