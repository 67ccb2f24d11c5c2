"""The ci scale for real: every verb, every notebook, the page. Minutes; says nothing about accuracy or speed."""

import csv
import json
import re

import pytest
from project import ROOT, Project, copy_repository

from workflow.paper.grid import load_grid

pytestmark = pytest.mark.workflow
CI = ("--config", "scale=ci")
ARTEFACTS = sorted(file.stem for file in (ROOT / "config/experiments").glob("*.yaml"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The repository after ``snakemake --config scale=ci``."""
    project = copy_repository(tmp_path_factory.mktemp("ci") / "repository")
    project.run(*CI)
    return project


def records(project: Project, kind: str) -> list[dict]:
    found = [json.loads(file.read_text()) for file in (project / "results/ci").rglob("record.json")]
    return [record for record in found if record["kind"] == kind]


def test_everything_is_made(done: Project) -> None:
    results = done / "results/ci"
    for artefact in ARTEFACTS:
        for file in (f"notebooks/{artefact}.ipynb", f"notebooks/{artefact}.html", f"tables/{artefact}.csv"):
            assert (results / file).stat().st_size > 0
        assert list((results / "figures").glob(f"{artefact}*.png"))
    assert (results / "report.html").stat().st_size > 0
    grid = load_grid(ROOT / "config", "ci")
    assert len(records(done, "train")) == len(grid.runs) + len(grid.pretrains)
    assert len(records(done, "bench")) == len(grid.benches)
    assert len(records(done, "microbench")) + len(records(done, "plan")) == len(grid.microbenches)


def test_a_second_run_does_nothing(done: Project) -> None:
    assert "Nothing to be done" in done.run(*CI)


def test_the_table_says_what_the_records_say(done: Project) -> None:
    with (done / "results/ci/tables/imagenet_methods.csv").open() as file:
        table = [line["top-1 (%)"] for line in csv.DictReader(file)]
    manifest = json.loads((done / "results/ci/manifests/imagenet_methods.json").read_text())
    trained = [json.loads((done / row["records"][0]).read_text()) for row in manifest["rows"] if row["run"]]
    assert [cell.split()[0] for cell in table] == [f"{record['metrics']['top1']:.1f}" for record in trained]
    for record in records(done, "train") + records(done, "bench"):
        assert record["provenance"]["packages"]["torch"]
        if "schedule" in record["spec"]["prune"] and record["spec"]["prune"]["reducer"] != "none":
            assert min(record["tokens"]) < record["tokens"][0]


@pytest.mark.parametrize("page", [*(f"notebooks/{artefact}.html" for artefact in ARTEFACTS), "report.html"])
def test_pages_open_without_a_network_and_their_links_lead_somewhere(done: Project, page: str) -> None:
    file = done / "results/ci" / page
    text = file.read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']https?:[^\"']*", text)
    assert not re.findall(r"<link\b[^>]*\bhref=[\"']https?:[^\"']*", text)
    assert str(done.path) not in text, "a path of the machine"
    assert "No description" not in text, "a picture without alternative text"
    if page == "report.html":
        links = re.findall(r"(?:href|src)=[\"']([^\"'#:]+)(?:#[^\"']*)?[\"']", text)
        assert links
        assert [link for link in links if not (file.parent / link).exists()] == []


def test_one_ablation_is_compared_without_training(done: Project) -> None:
    output = done.run(*CI, "row=no_mlp", "--", "compare")
    assert "Aggregator: no MLP" in output
    assert "One seed says nothing of another" in output
    assert not re.search(r"Training \w+/", output), "a job ran"
