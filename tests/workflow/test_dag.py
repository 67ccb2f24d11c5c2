"""What runs, and what runs again; how few files a change touches. With stub jobs, so in seconds."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT, Project, counts

from workflow.paper.configuration import read_yaml

pytestmark = pytest.mark.workflow
CI = ("--config", "scale=ci")
ALWAYS = {"report", "reproduce"}


def manifest(project: Project, artefact: str) -> dict[str, dict]:
    """Rows of a manifest by name."""
    content = json.loads((project / f"results/ci/manifests/{artefact}.json").read_text())
    return {row["row"]: row for row in content["rows"]}


def test_dry_run_is_quick_and_loads_no_torch(stubbed: Project, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("torch", "timm", "torchvision"):
        (trap / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = stubbed.snakemake("--cores", "2", "--dry-run", env={"PYTHONPATH": str(trap)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stdout
    jobs = counts(result.stdout)
    assert set(jobs) >= {"data", "shipped", "train", "bench", "microbench", "maps", "manifest", "notebook"} | ALWAYS
    # Processor time, which other tests beside this one do not lengthen.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_one_artefact_by_name_and_more_seeds_and_shipped_weights_where_they_fit(stubbed: Project) -> None:
    one, three = stubbed.planned("ablations", *CI), stubbed.planned("ablations", *CI, "seeds=3")
    assert set(one) == {"data", "pretrain", "train", "bench", "manifest", "notebook", "ablations"}
    assert three == one | {"train": 3 * one["train"]}
    assert "pretrain" not in stubbed.planned()
    assert "shipped" not in stubbed.planned("--config", "pretrain=make")
    (stubbed / "overlay.yaml").write_text("overrides: {tasks: {classification: {pretrain: {recipe: {epochs: 1}}}}}")
    assert stubbed.planned("--configfile", "overlay.yaml")["pretrain"] == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("scales=ci", r"config/config\.yaml: scales: unknown key; allowed: .*scale"),
        ("row=nothing", r"row = 'nothing': no such row to compare; choose one of .*ablations/no_mlp"),
    ],
)
def test_bad_configuration_stops_with_one_message(stubbed: Project, config: str, message: str) -> None:
    result = stubbed.snakemake("--cores", "2", "--config", config)
    assert result.returncode != 0
    assert re.search(message, result.stdout), result.stdout
    assert "Building DAG" not in result.stdout
    assert not (stubbed / "results").exists()


def test_the_first_table_is_made_first_and_measurements_last(finished: Project) -> None:
    log = next((finished / ".snakemake/log").glob("*.log")).read_text()
    order = re.findall(r"(Training|Measuring throughput of) (\w+)/", log)
    # Not model_size: its first weights take all cores, and so wait until none is busy.
    trained = list(dict.fromkeys(name for verb, name in order if verb == "Training" and name != "model_size"))
    assert trained == sorted(trained, key=lambda name: read_yaml(finished / f"config/experiments/{name}.yaml")["order"])
    kinds = [verb == "Training" for verb, _ in order]
    assert kinds == sorted(kinds, reverse=True), "nothing is timed before the last run has ended"


def test_a_second_run_does_nothing_nor_after_a_touch_or_a_comment(finished: Project) -> None:
    os.utime(finished / "notebooks/ablations.ipynb")
    finished.edit("cropr/pruning/reducers/select.py", "import math", "# A comment.\nimport math")
    assert finished.planned(*CI) == {}
    finished.run(*CI, "--report", "provenance.html")
    assert (finished / "provenance.html").stat().st_size > 1e6


def test_editing_a_row_reruns_that_row_its_notebook_and_the_report(finished: Project) -> None:
    before = manifest(finished, "ablations")["aux_0.1"]["run"]
    finished.edit("config/experiments/ablations.yaml", "aux_weight: 0.1", "aux_weight: 0.2")
    assert finished.planned(*CI) == dict.fromkeys({"train", "manifest", "notebook"} | ALWAYS, 1)
    finished.run(*CI)
    assert manifest(finished, "ablations")["aux_0.1"]["run"] != before
    assert finished.planned(*CI) == {}


@pytest.mark.parametrize(
    ("file", "old", "new", "jobs"),
    [
        ("config/experiments/ablations.yaml", '"Scorer: 16 heads', '"Scorer: many heads', {"manifest", "notebook"}),
        ("config/published/ablations.csv", "heads_16,top1,85.2", "heads_16,top1,85.3", {"notebook"}),
        ("config/claims.yaml", "- id: mlp_helps", "- id: mlp_is_better", {"notebook"}),
        ("notebooks/ablations.ipynb", '"nbformat": 4', '"nbformat":  4', {"notebook"}),
        ("workflow/paper/page.py", "import argparse", "import argparse, sys", set()),
    ],
)
def test_editing_what_a_notebook_reads_trains_nothing(finished: Project, file: str, old: str, new: str, jobs) -> None:
    finished.edit(file, old, new)
    assert finished.planned(*CI) == dict.fromkeys(jobs | ALWAYS, 1)


@pytest.mark.parametrize(
    ("file", "rerun", "kept"),
    [
        ("cropr/training/loop.py", {"pretrain", "train", "maps"}, {"data", "bench"}),
        ("cropr/tasks/detection/model.py", {"pretrain", "train"}, {"data"}),
        ("cropr/bench/throughput.py", {"bench"}, {"data", "train", "maps"}),
        ("workflow/paper/grid.py", set(), {"data", "train", "bench", "microbench", "notebook", "report"}),
    ],
)
def test_editing_code_reruns_its_jobs(finished: Project, everything: dict[str, int], file: str, rerun, kept) -> None:
    with (finished / file).open("a") as source:
        source.write("\nCHANGED = 1\n")
    jobs = finished.planned(*CI)
    assert set(jobs) >= rerun
    assert not set(jobs) & kept
    assert (jobs.get("train", 0) < everything["train"]) == ("loop" not in file)


def test_one_ablation_runs_itself_and_its_baseline(stubbed: Project, everything: dict[str, int]) -> None:
    call = ("--config", "scale=ci", "seeds=2", "row=no_mlp", "--", "compare")
    assert stubbed.planned(*call) == {"data": 2, "pretrain": 1, "train": 4, "manifest": 1, "compare": 1}
    output = stubbed.run(*call)
    assert "Aggregator: no MLP" in output
    table = re.search(r"Top-1.*", output)
    assert table is not None, output
    assert table[0].count("[") == 3, "two means and a difference with intervals"
    assert stubbed.planned("--config", "scale=ci", "seeds=2")["train"] == 2 * everything["train"] - 4


def test_compare_after_the_whole_table_trains_nothing_and_lint_is_clean(finished: Project) -> None:
    assert finished.planned("--config", "scale=ci", "row=ablations/sample", "--", "compare") == {"compare": 1}
    result = finished.snakemake("--cores", "2", "compare")
    assert result.returncode != 0
    assert re.search(r"compare needs a row: --config row=.*ablations/no_mlp", result.stdout)
    result = finished.snakemake("--lint")
    assert result.returncode == 0, result.stdout


def test_use_conda_without_conda_names_the_pip_path(stubbed: Project, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = stubbed.snakemake("--cores", "2", "--use-conda", env={"PATH": str(tmp_path / "empty")})
    assert result.returncode != 0
    assert "--use-conda needs a program called conda" in result.stdout
    assert "make reproduce, or pip install" in result.stdout


def test_use_conda_with_a_stand_in_runs_if_the_specs_solve(stubbed: Project, tmp_path: Path) -> None:
    conda = tmp_path / "conda-root/conda"
    conda.parent.mkdir()
    body = (Path(__file__).parent / "conda_stand_in.py").read_text().partition("\n")[2]
    conda.write_text(f"#!{sys.executable}\n{body}")
    conda.chmod(0o755)
    path = f"{conda.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "STAND_IN_OUTER": sys.prefix, "PYTHONPATH": "/nowhere"}
    result = stubbed.snakemake("--cores", "all", "--use-conda", *CI, "--", "relevance", env=environment)
    assert result.returncode == 0, result.stdout
    created = [call for call in (conda.parent / "calls.log").read_text().splitlines() if call.startswith("env create")]
    assert len(created) == len(list((stubbed / "envs").glob("*.yaml")))
    assert "Activating conda environment" in result.stdout


@pytest.mark.parametrize(("scale", "name"), [("fashion", "fashion"), ("workstation", "pets")])
def test_a_public_set_is_downloaded_once_or_is_a_users_folder(stubbed, tmp_path: Path, scale: str, name: str) -> None:
    config = ("--config", f"scale={scale}", "source=/data/archives")
    shown = stubbed.run("--dry-run", "--printshellcmds", *config)
    written = rf"--out .*results/{scale}/data/imagenet/record.json.* --source /data/archives"
    assert re.search(f"cropr data {name} {written}", shown)
    planned = stubbed.planned(*config)
    assert planned[f"download_{name}"] == 1
    assert planned["train"] > 1
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "own" / folder).mkdir(parents=True)
    if scale == "workstation":
        assert "download_pets" not in stubbed.planned(*config, f"folder={tmp_path / 'own'}")


PAGE = (ROOT / "docs/how_to.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
"""Files that the how-tos add, by their path."""
COMMANDS = "".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)).splitlines()
NOTEBOOK = json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
ROW = "  - {row: largest, label: Largest, reducer: largest, schedule: r8, fusion: llf}\n"
BACKBONE = '''"""A host of one's own."""

from __future__ import annotations

from torch import nn

from cropr.pruning.backbones.vit import ViTBackbone


class Host(nn.Module):
    pass


class Adapter(ViTBackbone):
    def __init__(self, host: nn.Module) -> None:
        nn.Module.__init__(self)


ADAPTERS = {"cropr.pruning.backbones.toy.Host": "Adapter"}
'''


def python(project: Project, code: str) -> str:
    """What a program prints that runs in the copy."""
    call = [sys.executable, "-c", code]
    result = subprocess.run(call, cwd=project.path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def add(project: Project, changes: dict[str, str]) -> None:
    """Append to files, or make them."""
    for name, text in changes.items():
        with (project / name).open("a", encoding="utf-8") as file:
            file.write(text)


def test_a_reducer_is_its_module_and_a_row(project: Project) -> None:
    (reducer,) = (name for name in FILES if "reducers" in name)
    add(project, {reducer: FILES[reducer], "config/experiments/imagenet_methods.yaml": ROW})
    code = (
        "import timm, torch, cropr; from workflow.paper.grid import load_grid\n"
        "row = load_grid('config', 'ci').artefacts['imagenet_methods']['largest']\n"
        "print(row.reducer, len(row.records))\n"
        "vit = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=3, num_classes=2)\n"
        "model = cropr.prune(vit, schedule=cropr.Schedule.constant(rate=4), reducer='largest')\n"
        "print(*model.eval()(torch.zeros(1, 3, 64, 64)).logits.shape)"
    )
    assert python(project, code).split() == ["largest", "1", "1", "2"]
    code = "import sys; sys.argv = ['cropr', 'bench', '--help']; from cropr.__main__ import main; main()"
    assert "largest" in python(project, code)


def test_the_workflow_commands_of_the_how_tos_run(stubbed: Project) -> None:
    """With stub jobs; the files that the page shows are there, and a table is its YAML and its notebook."""
    (table,) = (name for name in FILES if "experiments" in name)
    add(stubbed, {table: FILES[table], f"notebooks/{Path(table).stem}.ipynb": NOTEBOOK})
    add(stubbed, {name: text for name, text in FILES.items() if "/" not in name})
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (stubbed / "photos" / folder).mkdir(parents=True)
    run = [command for command in COMMANDS if command.startswith(("snakemake", "cp"))]
    assert len(run) >= 7
    for command in run:
        if command.endswith(("-- compare", "folder=photos", "scale=fashion")):  # stubs write no images
            command = command.replace(" --", " -n --", 1)
        shell = command.replace("snakemake", f"{sys.executable} -m snakemake", 1).replace("--cores all", "--cores 2")
        done = subprocess.run(shell, shell=True, cwd=stubbed.path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def test_a_backbone_is_one_adapter(project: Project) -> None:
    add(project, {"cropr/pruning/backbones/toy.py": BACKBONE})
    code = (
        "from cropr.pruning.backbones import adapt; from cropr.pruning.backbones.toy import Host\n"
        "from workflow.paper.sources import closure\n"
        "print(type(adapt(Host())).__name__, 'cropr.pruning.backbones.toy' in closure('cropr.pruning.model'))"
    )
    assert python(project, code).split() == ["Adapter", "True"]
