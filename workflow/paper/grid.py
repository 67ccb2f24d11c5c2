"""The grid: which runs a table or figure needs, and what each run is told.

An artefact (``config/experiments/*.yaml``) lists its rows without any scale; a scale (``config/scales/*.yaml``) says
what their symbolic names mean. Together they give every row a ``TrainSpec`` and a ``BenchSpec``, whose digests name
the runs: two rows that ask for the same share it. Everything is checked here, before any job starts.

    grid = load_grid("config", scale="laptop", seeds=3)
    grid.runs["1a2b3c4d5e"]                 # TrainSpec
    grid.manifest("imagenet_methods")       # what the notebook reads

Pure Python and pydantic, no torch: Snakemake builds its DAG from this.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cropr.bench.specs import BenchSpec, PlanSpec
from cropr.bench.specs import MicrobenchSpec as LabSpec
from cropr.specs import ScenesSpec
from cropr.tasks import TASKS
from cropr.training.specs import TrainSpec
from workflow.paper.configuration import (
    ArtefactConfig,
    RowConfig,
    ScaleConfig,
    TaskConfig,
    check,
    merge,
    parse_seeds,
    read_yaml,
)
from workflow.paper.resolving import Laboratory, Resolver, Row, Scale

ORDER = (
    "imagenet_methods", "ablations", "pruning_maps", "relevance",
    "ade20k", "reactivation", "pruning_maps_segmentation",
    "coco", "pruning_maps_detection",
    "precision", "alignment", "breakeven", "profile", "memory", "plan",
)  # fmt: skip
"""Artefacts in the order in which they are made and read; others follow by name."""


@dataclass(frozen=True, slots=True)
class Artefact:
    """A table or figure with its rows resolved."""

    name: str
    title: str
    task: str
    baseline: str | None
    needs: frozenset[str]
    published: str | None
    """File of published numbers, relative to the repository."""
    rows: tuple[Row, ...]

    def __getitem__(self, row: str) -> Row:
        for candidate in self.rows:
            if candidate.row == row:
                return candidate
        raise KeyError(row)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the images and the first weights of a task come from."""

    folder: str
    """The images: the user's folder, or one under ``results``."""
    layout: str
    scenes: ScenesSpec | None
    """The images to generate; None: they are the user's."""
    pretrain: TrainSpec | None
    """Makes the weights that every run of the task starts from; None where timm has them."""
    shipped: str | None
    """Weights file in the repository that may stand for ``pretrain``."""


@dataclass(frozen=True)
class Grid:
    """All that the workflow runs at one scale."""

    scale: str
    config: ScaleConfig
    seeds: tuple[int, ...]
    artefacts: dict[str, Artefact]
    runs: dict[str, TrainSpec]
    """Fine-tuning runs by id."""
    benches: dict[str, BenchSpec]
    labs: dict[str, LabSpec | PlanSpec]
    """Measurements of the laboratory by id."""
    sources: dict[str, Source]
    """Tasks that some artefact needs."""
    names: dict[str, str] = field(default_factory=dict)
    """Run or measurement -> ``artefact/row`` that asks for it first."""
    lacking: tuple[str, ...] = ()
    """Tasks whose artefacts are left out because no folder with their images is given."""

    # Files ------------------------------------------------------------------------------------------------------

    @property
    def results(self) -> str:
        """Folder of everything that this scale makes."""
        return results(self.scale)

    @property
    def generated(self) -> dict[str, ScenesSpec]:
        """Layout -> the images to generate in it."""
        return {source.layout: source.scenes for source in self.sources.values() if source.scenes}

    @property
    def pretrains(self) -> dict[str, Source]:
        """Runs that make first weights, by id, with the task's source."""
        return {source.pretrain.digest(): source for source in self.sources.values() if source.pretrain}

    def source(self, run: str) -> Source:
        """Images and first weights of a run, or of a run that makes first weights, by id."""
        if run in self.runs:
            return self.sources[self.runs[run].task]
        return self.pretrains[run]

    def record(self, run: str, seed: int) -> str:
        """Record of a fine-tuning run."""
        return f"{self.results}/runs/{run}/seed{seed}/record.json"

    def bench(self, bench: str) -> str:
        """Record of a throughput measurement."""
        return f"{self.results}/bench/{bench}/record.json"

    def lab(self, lab: str) -> str:
        """Record of a measurement of the laboratory."""
        return f"{self.results}/lab/{lab}/record.json"

    def maps(self, run: str) -> str:
        """Pruning maps of a run, of the first seed."""
        return f"{self.results}/maps/{run}/seed{self.seeds[0]}.npz"

    def files(self, artefact: str) -> list[str]:
        """Every record that a notebook reads, each once."""
        found: dict[str, None] = {}
        for row in self.manifest(artefact)["rows"]:
            found |= dict.fromkeys([*row["records"], *filter(None, (row["bench"], row["maps"]))])
        return list(found)

    # What jobs are told -----------------------------------------------------------------------------------------

    def manifest(self, artefact: str, rows: Iterable[str] | None = None) -> dict[str, Any]:
        """Rows of an artefact with the paths of their records: all that a notebook is told.

        Args:
            artefact: its name.
            rows: these only, and only their training records.
        """
        chosen = self.artefacts[artefact]
        wanted = None if rows is None else set(rows)
        listed = [row for row in chosen.rows if wanted is None or row.row in wanted]
        return {
            "artefact": chosen.name,
            "title": chosen.title,
            "task": chosen.task,
            "scale": self.scale,
            "seeds": list(self.seeds),
            "results": self.results,
            "published": chosen.published,
            "rows": [self._entry(chosen, row, wanted is None) for row in listed],
        }

    def priority(self, key: str) -> int:
        """Greater for runs that an earlier artefact waits for."""
        return self._priorities.get(key, 0)

    def comparable(self) -> list[str]:
        """``artefact/row`` of every row that can run and has a baseline to stand beside."""
        return [
            f"{artefact.name}/{row.row}"
            for artefact in self.artefacts.values()
            for row in artefact.rows
            if artefact.baseline not in (None, row.row) and row.available
        ]

    def find_row(self, row: str) -> tuple[str, str]:
        """Artefact and name of a comparable row, given as ``artefact/row``, or as ``row`` where one artefact has it.

        Raises:
            ValueError: no such row, or several; with those that there are.
        """
        found = [name for name in self.comparable() if row in (name, name.partition("/")[2])]
        if len(found) != 1:
            problem = f"this may be {' or '.join(found)}" if found else "no such row to compare"
            raise ValueError(f"row = {row!r}: {problem}; choose one of {', '.join(self.comparable())}")
        artefact, _, name = found[0].partition("/")
        return artefact, name

    def _entry(self, artefact: Artefact, row: Row, everything: bool) -> dict[str, Any]:
        """One row of a manifest."""
        needs = artefact.needs if everything else {"train"}
        train = row.run is not None and bool(needs & {"train", "truth"})
        return {
            "row": row.row,
            "label": row.label,
            "columns": row.columns,
            "available": row.available,
            "why": row.why,
            "run": row.run,
            "baseline": artefact.baseline,
            "records": [self.record(row.run, seed) for seed in self.seeds] if train and row.run else [],
            "bench": self._measurement(row, needs),
            "maps": self.maps(row.run) if row.run and "maps" in needs else None,
        }

    def _measurement(self, row: Row, needs: Collection[str]) -> str | None:
        if row.lab:
            return self.lab(row.lab)
        return self.bench(row.bench) if row.bench and "bench" in needs else None

    @cached_property
    def _priorities(self) -> dict[str, int]:
        ranks: dict[str, int] = {}
        for rank, artefact in enumerate(reversed(self.artefacts.values()), start=1):
            ranks |= {row.run: rank for row in artefact.rows if row.run}
        return ranks


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
        roots: the user's folders by the key that a scale's ``data.root`` names. Tasks without theirs are left out, as
            long as any is left.
        overrides: laid over the scale's file.

    Raises:
        ValueError: unknown key, reducer or row, impossible schedule, data root not given: file, key, value, fix.
        FileNotFoundError: no such scale; or a data root without the folders that it needs.
    """
    folder = Path(config)
    file = folder / "scales" / f"{scale}.yaml"
    source = f"{file} with overrides" if overrides else str(file)
    chosen = check(ScaleConfig, merge(read_yaml(file), overrides or {}), source)
    own, given = Scale(scale, chosen, source), roots or {}
    artefacts = _read(folder, chosen)
    needed = tuple(dict.fromkeys(artefact.task for artefact in artefacts.values() if not artefact.is_lab))
    lacking = tuple(task for task in needed if not _has_images(chosen.tasks[task], given))
    if lacking != needed:  # else the first of them says what is missing
        artefacts = {name: one for name, one in artefacts.items() if one.is_lab or one.task not in lacking}
    resolvers = {
        task: Resolver(task, own, _paper(folder) if chosen.tasks[task].bench.model == "paper" else own, given)
        for task in dict.fromkeys(artefact.task for artefact in artefacts.values() if not artefact.is_lab)
    }
    lab = Laboratory(scale, chosen.lab)
    resolved = _resolve(folder, artefacts, resolvers, lab)
    lab.verify(source)
    _verify_measured(chosen, resolved, source)
    return Grid(
        scale=scale,
        config=chosen,
        seeds=parse_seeds(chosen.seeds if seeds is None else seeds),
        artefacts=resolved,
        runs={run: spec for resolver in resolvers.values() for run, spec in resolver.runs.items()},
        benches={bench: spec for resolver in resolvers.values() for bench, spec in resolver.benches.items()},
        labs=lab.specs,
        sources={task: _source(scale, resolver) for task, resolver in resolvers.items()},
        names={key: name for resolver in resolvers.values() for key, name in resolver.names.items()} | lab.names,
        lacking=lacking,
    )


def _has_images(task: TaskConfig, roots: Mapping[str, Path | None]) -> bool:
    """Whether images are generated, or a folder of the user's is given; a key that does not exist is found later."""
    key = task.data.get("root")
    return key is None or roots.get(key, Path()) is not None


def _verify_measured(scale: ScaleConfig, artefacts: Mapping[str, Artefact], source: str) -> None:
    """Refuse ``bench.rows`` that do not exist."""
    for task, config in scale.tasks.items():
        tables = [artefact for artefact in artefacts.values() if artefact.task == task and "bench" in artefact.needs]
        known = {row.row for artefact in tables for row in artefact.rows}
        if tables and (unknown := sorted(set(config.bench.rows or ()) - known)):
            raise ValueError(
                f"{source}: tasks.{task}.bench.rows: no row {unknown[0]!r}; choose among {', '.join(sorted(known))}"
            )


def _paper(folder: Path) -> Scale:
    """The scale whose models are measured at others, too."""
    file = folder / "scales" / "paper.yaml"
    return Scale("paper", check(ScaleConfig, read_yaml(file), str(file)), str(file))


def results(scale: str) -> str:
    """Folder of everything that a scale makes."""
    return f"results/{scale}"


def _source(scale: str, resolver: Resolver) -> Source:
    layout, pretrain = TASKS[resolver.task].layout, resolver.config.pretrain
    return Source(
        folder=str(resolver.root or f"{results(scale)}/data/{layout}"),
        layout=layout,
        scenes=None if resolver.root else resolver.data.scenes,
        pretrain=resolver.pretrain,
        shipped=pretrain.shipped if pretrain else None,
    )


def shipped(path: str | Path, digest: str) -> bool:
    """Whether the weights file exists and was made by the run of this digest, as its safetensors header says."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8 or (size := struct.unpack("<Q", head)[0]) > path.stat().st_size:
            return False
        try:
            metadata = json.loads(file.read(size)).get("__metadata__", {})
        except (ValueError, AttributeError):
            return False
    return bool(metadata.get("spec") == digest)


def _read(folder: Path, scale: ScaleConfig) -> dict[str, ArtefactConfig]:
    """All artefacts of the tasks that the scale has, in ``ORDER``."""
    files = sorted(
        (folder / "experiments").glob("*.yaml"),
        key=lambda file: (ORDER.index(file.stem) if file.stem in ORDER else len(ORDER), file.stem),
    )
    configs = {file.stem: check(ArtefactConfig, read_yaml(file), str(file)) for file in files}
    return {name: config for name, config in configs.items() if config.is_lab or config.task in scale.tasks}


def _resolve(
    folder: Path,
    configs: Mapping[str, ArtefactConfig],
    resolvers: Mapping[str, Resolver],
    lab: Laboratory,
) -> dict[str, Artefact]:
    """The artefacts with their rows resolved; without those that need a truth that the data do not hold, and those
    without a row at this scale."""
    artefacts = {}
    for name, config in configs.items():
        file = folder / "experiments" / f"{name}.yaml"
        if config.is_lab:
            rows = tuple(lab.rows(file, config))
        else:
            resolver = resolvers[config.task]
            if "truth" in config.needs and resolver.data.scenes is None:
                continue
            mates = {other: content for other, content in configs.items() if content.task == config.task}
            rows = tuple(
                resolver.row(str(file), f"{name}/{row.row}", row, _used(file, row, mates), config.needs)
                for row in config.rows
            )
        if not rows:
            continue
        if config.baseline is not None and config.baseline not in {row.row for row in config.rows}:
            raise ValueError(
                f"{file}: baseline = {config.baseline!r} is no row; choose one of "
                f"{', '.join(row.row for row in config.rows)}"
            )
        published = folder / "published" / f"{name}.csv"
        artefacts[name] = Artefact(
            name=name,
            title=config.title,
            task=config.task,
            baseline=config.baseline,
            needs=frozenset(config.needs),
            published=str(published) if published.is_file() else None,
            rows=rows,
        )
    return artefacts


def _used(file: Path, row: RowConfig, configs: Mapping[str, ArtefactConfig]) -> RowConfig:
    """The row that ``use`` names, or the row itself."""
    if row.use is None:
        return row
    if extra := sorted(row.model_fields_set - {"row", "label", "use"}):
        raise ValueError(f"{file}: row {row.row}: {', '.join(extra)} cannot stand beside use; drop one of them")
    artefact, _, name = row.use.partition("/")
    places = {f"{a}/{r.row}": r for a, config in configs.items() for r in config.rows if r.use is None}
    if row.use not in places:
        raise ValueError(f"{file}: row {row.row}: use = {row.use!r} is no row; choose one of {', '.join(places)}")
    return places[f"{artefact}/{name}"]
