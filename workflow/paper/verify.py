"""Whether tables follow from their records, and which records a row comes from.

    python -m workflow.paper.verify results/laptop                               all records and tables; some minutes
    python -m workflow.paper.verify results/laptop --row imagenet_methods/none   what each cell of a row comes from

A record must have the id of its specification, and lie where the workflow put it. Each notebook runs again on the same
records, elsewhere; its table must come out equal to the byte.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cropr.bench.specs import BenchSpec, PlanSpec
from cropr.records import read_record
from cropr.specs import Spec
from cropr.tasks import TrainSpec
from workflow.paper.microbench import MEASURES
from workflow.paper.page import artefacts
from workflow.paper.records import REPOSITORY, find_results, load_manifest
from workflow.paper.run_notebook import execute

KINDS: dict[str, type[Spec]] = {"train": TrainSpec, "bench": BenchSpec, "plan": PlanSpec, **MEASURES}
MADE = ("tables", "figures", "notebooks", "logs", "report.html")
"""What is made from records, and so is made again."""
ORIGIN = ("commit", "dirty", "lock_sha256", "device", "data_fingerprint", "started")
Run = Callable[[str, Path], None]


def sources(artefact: str, results: Path) -> dict[str, list[Path]]:
    """Row -> the records that its cells come from."""
    manifest = load_manifest(artefact, results)
    paths = {row["row"]: [*row["records"], *filter(None, [row["bench"]])] for row in manifest["rows"]}
    return {row: [results / Path(p).relative_to(manifest["results"]) for p in found] for row, found in paths.items()}


def wrong_record(path: Path) -> str | None:
    """What is wrong with a record, None if nothing is."""
    try:
        record = read_record(path)
        kind = KINDS[record["spec"].get("measure") or record["kind"]]
        digest = kind.model_validate(record["spec"]).digest()
    except (OSError, ValueError, KeyError) as error:
        return f"{path}: {error}"
    if digest != record["id"] or digest not in path.parts:
        return f"{path}: its specification has the id {digest}, the record says {record['id']}"
    return None


def run_notebook(name: str, results: Path) -> None:
    """Run a notebook on a folder of records."""
    execute(REPOSITORY / f"notebooks/{name}.ipynb", results / f"logs/{name}.ipynb", {"results": str(results)})


def wrong_tables(names: list[str], results: Path, run: Run = run_notebook) -> Iterator[str]:
    """A line for each table that its notebook does not make of the records."""
    with tempfile.TemporaryDirectory() as folder:
        for entry in results.iterdir():
            if entry.name not in MADE:
                (Path(folder) / entry.name).symlink_to(entry.resolve())
        for name in names:
            run(name, Path(folder))
            for suffix in (".csv", ".md"):
                old, new = (place / f"tables/{name}{suffix}" for place in (results, Path(folder)))
                if not old.is_file() or old.read_bytes() != new.read_bytes():
                    yield f"{old}: does not follow from the records; make it again: snakemake --cores all {name}"


def origin(path: Path) -> str:
    """One line on where a record comes from."""
    record: dict[str, Any] = read_record(path)
    told = {"seed": record.get("seed"), **{name: record["provenance"].get(name) for name in ORIGIN}}
    return f"{path}: " + ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns 0, or 1 if something does not follow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of a finished scale")
    parser.add_argument("--row", metavar="ARTEFACT/ROW", help="say what the cells of this row come from")
    args = parser.parse_args(argv)
    try:
        results = find_results(args.results)
    except FileNotFoundError as error:
        parser.error(str(error))
    if args.row:
        artefact, _, row = args.row.partition("/")
        found = sources(artefact, results)
        if row not in found:
            parser.error(f"--row {args.row}: {artefact} has no such row; it has {', '.join(found)}")
        lines, status = [origin(path) for path in found[row]], 0
    else:
        names = artefacts(results)
        records = {path for name in names for found in sources(name, results).values() for path in found}
        lines = [*filter(None, map(wrong_record, sorted(records))), *wrong_tables(names, results)]
        status = int(bool(lines))
        lines = lines or [f"{len(records)} records and {len(names)} tables follow"]
    sys.stdout.write("\n".join(lines) + "\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
