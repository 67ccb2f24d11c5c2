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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cropr.configuration import ArtefactConfig, RowConfig, ScaleConfig, check, merge, parse_seeds, read_yaml
from cropr.resolving import Resolver, Row
from cropr.specs import BenchSpec, ScenesSpec, TrainSpec

ORDER = ("imagenet_methods", "ablations", "pruning_maps", "relevance")
"""Artefacts in the order in which they are made and read; others follow by name."""


@dataclass(frozen=True, slots=True)
class Artefact:
    """A table or figure with its rows resolved."""

    name: str
    title: str
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
    pretrain: TrainSpec | None
    """Makes the weights that every run starts from; None where timm has them."""
    root: Path | None
    """Folder of the user's images; None: ``scenes`` are generated."""
    names: dict[str, str] = field(default_factory=dict)
    """Run or measurement -> ``artefact/row`` that asks for it first."""

    # Files ------------------------------------------------------------------------------------------------------

    @property
    def results(self) -> str:
        """Folder of everything that this scale makes."""
        return f"results/{self.scale}"

    @property
    def data(self) -> str:
        """Folder of the images."""
        return str(self.root) if self.root else f"{self.results}/data/scenes"

    def record(self, run: str, seed: int) -> str:
        """Record of a fine-tuning run."""
        return f"{self.results}/runs/{run}/seed{seed}/record.json"

    def bench(self, bench: str) -> str:
        """Record of a throughput measurement."""
        return f"{self.results}/bench/{bench}/record.json"

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

    @property
    def scenes(self) -> ScenesSpec | None:
        """The data set to generate, if any."""
        return None if self.root else self.config.data.scenes

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
            "scale": self.scale,
            "seeds": list(self.seeds),
            "results": self.results,
            "published": chosen.published,
            "rows": [self._entry(chosen, row, wanted is None) for row in listed],
        }

    def priority(self, key: str) -> int:
        """Greater for runs and measurements that an earlier artefact waits for."""
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
            "bench": self.bench(row.bench) if row.bench and "bench" in needs else None,
            "maps": self.maps(row.run) if row.run and "maps" in needs else None,
        }

    @cached_property
    def _priorities(self) -> dict[str, int]:
        ranks: dict[str, int] = {}
        for rank, artefact in enumerate(reversed(self.artefacts.values()), start=1):
            ranks[artefact.name] = 10 * rank
            ranks |= {key: 10 * rank for row in artefact.rows for key in (row.run, row.bench) if key}
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
        roots: the user's folders by the key that a scale's ``data.root`` names.
        overrides: laid over the scale's file.

    Raises:
        ValueError: unknown key, reducer or row, impossible schedule, data root not given: file, key, value, fix.
        FileNotFoundError: no such scale; or a data root without the folders that it needs.
    """
    folder = Path(config)
    file = folder / "scales" / f"{scale}.yaml"
    values = read_yaml(file)
    source = f"{file} with overrides" if overrides else str(file)
    chosen = check(ScaleConfig, merge(values, overrides or {}), source)
    root = _find_root(chosen, source, roots or {})
    bench = chosen
    bench_source = source
    if chosen.bench.model == "paper":
        bench_source = str(folder / "scales" / "paper.yaml")
        bench = check(ScaleConfig, read_yaml(folder / "scales" / "paper.yaml"), bench_source)
    resolver = Resolver(chosen, source, bench, bench_source, root)
    artefacts = _resolve(folder, resolver)
    return Grid(
        scale=scale,
        config=chosen,
        seeds=parse_seeds(chosen.seeds if seeds is None else seeds),
        artefacts=artefacts,
        runs=resolver.runs,
        benches=resolver.benches,
        pretrain=resolver.pretrain,
        root=root,
        names=resolver.names,
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


def _resolve(folder: Path, resolver: Resolver) -> dict[str, Artefact]:
    """All artefacts, in ``ORDER``, with their rows resolved."""
    files = sorted(
        (folder / "experiments").glob("*.yaml"),
        key=lambda file: (ORDER.index(file.stem) if file.stem in ORDER else len(ORDER), file.stem),
    )
    configs = {file.stem: check(ArtefactConfig, read_yaml(file), str(file)) for file in files}
    artefacts = {}
    for file in files:
        config = configs[file.stem]
        if config.baseline is not None and config.baseline not in {row.row for row in config.rows}:
            raise ValueError(
                f"{file}: baseline = {config.baseline!r} is no row; choose one of "
                f"{', '.join(row.row for row in config.rows)}"
            )
        if "truth" in config.needs and resolver.data.scenes is None:
            continue
        rows = tuple(
            resolver.row(str(file), f"{file.stem}/{row.row}", row, _used(file, row, configs), config.needs)
            for row in config.rows
        )
        published = folder / "published" / f"{file.stem}.csv"
        artefacts[file.stem] = Artefact(
            name=file.stem,
            title=config.title,
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


def _find_root(scale: ScaleConfig, source: str, roots: Mapping[str, Path | None]) -> Path | None:
    """The user's folder, checked as far as a listing goes; None where images are generated."""
    key = scale.data.root
    if key is None:
        if scale.data.scenes is None:
            raise ValueError(f"{source}: data: give scenes (generated) or root (one of {', '.join(roots)})")
        return None
    if key not in roots:
        raise ValueError(f"{source}: data.root = {key!r}: choose one of {', '.join(roots)}")
    root = roots[key]
    needed = "a folder with train/<class>/* and val/<class>/*"
    if root is None:
        raise ValueError(f"config/config.yaml: {key} = null, but this scale reads {needed}: --config {key}=/path/to/it")
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise FileNotFoundError(
                f"config/config.yaml: {key} = {root}: {root / split} is missing; {key} names {needed}"
            )
    return root
