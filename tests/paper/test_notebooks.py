"""The notebooks: clean sources that hold no result, and pages that come out the same from the same records."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from synthetic import DENSE, write_dense, write_results

from workflow.paper.grid import load_grid

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
ARTEFACTS = load_grid(ROOT / "config", scale="ci").artefacts.values()
GRID = {artefact.name for artefact in ARTEFACTS if not any(row.lab for row in artefact.rows)}
RUN = GRID | set(DENSE)
"""Notebooks for which there are made-up records: of the grid at the smallest scale, or of a dense task."""
LINES = 12
"""Code lines of a cell at most: what is longer belongs into cropr/report, where it is tested."""
FACTS = re.compile(r"Table 1|ImageNet-1k|ADE20k|ade20k|[Tt]op-1")
"""Digits that are part of a name."""


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def cells(path: Path, kind: str) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == kind]


def test_there_is_one_for_each_experiment():
    experiments = {path.stem for path in (ROOT / "config" / "experiments").glob("*.yaml")}
    assert experiments <= set(NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_source_is_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z-]+", name) for name in ids)  # chosen, not random
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
            assert len(cell.source.splitlines()) <= LINES
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert [cell.source.splitlines() for cell in tagged] == [
        [f'manifest = "results/laptop/manifests/{path.stem}.json"', 'results = "results/laptop"']
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_no_number_is_typed_by_hand(path):
    """Numbers come from records and published tables, so that the text is true at every scale."""
    for source in cells(path, "markdown") + cells(path, "code"):
        digits = re.findall(r".*\d.*", FACTS.sub("", source).replace("top1", ""))
        assert not digits, digits


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_opens_with_the_question_and_ends_with_limits_and_the_command(path):
    text = cells(path, "markdown")
    assert text[0].startswith("# ")
    assert "**Question.**" in text[0]
    assert text[-1].startswith("## What this does not show")
    code = cells(path, "code")
    assert "artefact = begin(manifest, results)" in code[1]
    assert "show_rerun(artefact)" in code[-1]


def run(name: str, manifest: Path, out: Path) -> subprocess.CompletedProcess:
    values = {"manifest": str(manifest), "results": str(out)}
    argv = [sys.executable, "workflow/run_notebook.py", f"notebooks/{name}.ipynb", "--params", json.dumps(values)]
    for option, file in (("executed", f"logs/{name}.ipynb"), ("notebook", f"notebooks/{name}.ipynb")):
        argv += [f"--{option}", str(out / file)]
    argv += ["--html", str(out / "notebooks" / f"{name}.html")]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.workflow
@pytest.mark.parametrize(("name", "seeds"), [(name, 1 + 2 * (i % 2)) for i, name in enumerate(sorted(RUN))])
def test_runs_on_records_and_leaves_tables_and_figures(tmp_path, name, seeds):
    results = tmp_path / "results"
    manifest = write_results(tmp_path, "ci", seeds)[name] if name in GRID else write_dense(tmp_path, name, seeds)
    done = run(name, manifest, results)
    assert done.returncode == 0, done.stderr
    html = (results / "notebooks" / f"{name}.html").read_text()
    assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', html)
    pictures = re.findall(r"<img\b[^>]*>", html)
    assert pictures
    assert all(re.search(r"alt=.[A-Z]", picture) and "No description" not in picture for picture in pictures)
    assert "Traceback" not in html
    assert ("one (no intervals over seeds)" in html) == (seeds == 1)
    made = [path.relative_to(results).as_posix() for path in sorted(results.rglob(f"{name}*"))]
    assert f"tables/{name}.csv" in made
    assert f"tables/{name}.md" in made
    files = [Path(path) for path in made if path.endswith(".png")]
    assert len(files) == len(pictures)
    assert all(file.with_suffix(".pdf").as_posix() in made for file in files)


@pytest.mark.workflow
def test_same_records_give_the_same_bytes(tmp_path):
    manifest = write_results(tmp_path, "ci", 1)["relevance"]
    found = []
    for _ in range(2):
        out = tmp_path / "out"
        assert run("relevance", manifest, out).returncode == 0
        kinds = ("notebooks/*.html", "notebooks/*.ipynb", "figures/*", "tables/*")
        found.append({path.name: path.read_bytes() for kind in kinds for path in sorted(out.glob(kind))})
    assert len(found[0]) == 6
    assert found[0] == found[1]


@pytest.mark.workflow
def test_a_missing_record_stops_the_notebook_with_the_command(tmp_path):
    manifest = write_results(tmp_path, "ci", 1)["relevance"]
    lost = Path(json.loads(manifest.read_text())["rows"][0]["records"][0])
    lost.unlink()
    done = run("relevance", manifest, tmp_path / "out")
    assert done.returncode == 1
    assert f"{lost}: no record; make it with: snakemake --cores all" in done.stderr
    assert not (tmp_path / "out" / "notebooks" / "relevance.html").exists()
