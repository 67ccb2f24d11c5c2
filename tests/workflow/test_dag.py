"""What runs, and what runs again: on stub jobs, so in seconds."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import struct
import sys
from pathlib import Path

import pytest

from .conftest import Project, counts

pytestmark = pytest.mark.workflow
CI = ("--config", "scale=ci")


def manifest(project: Project, artefact: str) -> dict[str, dict]:
    """Rows of a manifest by name."""
    content = json.loads((project / f"results/ci/manifests/{artefact}.json").read_text())
    return {row["row"]: row for row in content["rows"]}


# Building the graph --------------------------------------------------------------------------------------------------


def test_dry_run_is_quick_and_loads_no_torch(stubbed: Project, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("torch", "timm", "torchvision"):
        (trap / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = stubbed.snakemake("--cores", "2", "--dry-run", env={"PYTHONPATH": str(trap)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stdout
    assert "reproduce" in result.stdout
    # Time of the processor, which other tests beside this one do not lengthen.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_lint_is_clean(stubbed: Project) -> None:
    result = stubbed.snakemake("--lint")
    assert result.returncode == 0, result.stdout


def test_default_target_is_everything_at_laptop_scale(stubbed: Project) -> None:
    jobs = stubbed.planned()
    assert jobs == {
        "data": 3, "shipped": 3, "train": 31, "bench": 14, "lab": 11, "maps": 11, "manifest": 15, "notebook": 15,
        "report": 1, "reproduce": 1,
    }  # fmt: skip


def test_one_artefact_by_name(stubbed: Project) -> None:
    jobs = stubbed.planned("imagenet_methods")
    assert jobs == {
        "data": 1, "shipped": 1, "train": 9, "bench": 9, "manifest": 1, "notebook": 1, "imagenet_methods": 1
    }  # fmt: skip


def test_seeds_multiply_training_alone(stubbed: Project) -> None:
    jobs = stubbed.planned("--config", "scale=ci", "seeds=3")
    assert (jobs["train"], jobs["bench"], jobs["maps"], jobs["pretrain"]) == (96, 19, 11, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("scales=ci", r"config/config\.yaml: unknown key scales = 'ci'; allowed: .*scale"),
        ("row=nothing", r"row = 'nothing': no such row to compare; choose one of .*ablations/no_mlp"),
        ("scale=paper", r"imagenet = null, but this scale reads a folder .*--config imagenet="),
    ],
)
def test_bad_configuration_stops_with_one_message(stubbed: Project, config: str, message: str) -> None:
    result = stubbed.snakemake("--cores", "2", "--config", config)
    assert result.returncode != 0
    assert re.search(message, result.stdout), result.stdout
    assert "Building DAG" not in result.stdout
    assert not (stubbed / "results").exists()


def test_bad_grid_stops_with_one_message(stubbed: Project) -> None:
    stubbed.edit("config/experiments/ablations.yaml", "options: {mlp: false}", "options: {mpl: false}")
    result = stubbed.snakemake("--cores", "2")
    assert result.returncode != 0
    assert "ablations.yaml: row no_mlp: options = {'mpl': False}: reducer 'cropr' has no option mpl" in result.stdout
    assert not (stubbed / "results").exists()


def test_compare_without_a_row_names_the_rows(stubbed: Project) -> None:
    result = stubbed.snakemake("--cores", "2", "compare")
    assert result.returncode != 0
    assert re.search(r"compare needs a row: --config row=.*ablations/no_mlp", result.stdout)


def test_shipped_weights_are_taken_only_where_they_fit(stubbed: Project) -> None:
    sys.path.insert(0, str(stubbed.path))
    from workflow.paper.grid import load_grid

    pretrain = load_grid(stubbed / "config", "laptop").sources["classification"].pretrain
    assert pretrain is not None
    header = json.dumps({"__metadata__": {"spec": pretrain.digest()}}).encode()
    (stubbed / "assets").mkdir(exist_ok=True)
    (stubbed / "assets/laptop_vit.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    message = "Taking the pretrained weights that the repository ships"
    assert message in stubbed.dry_run()
    assert "Making the pretrained weights" in stubbed.dry_run("--config", "pretrain=make")
    overlay = stubbed / "overlay.yaml"
    overlay.write_text("overrides: {tasks: {classification: {pretrain: {recipe: {epochs: 1}}}}}")
    assert "Making the pretrained weights" in stubbed.dry_run("--configfile", "overlay.yaml")


# Running -------------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(finished: Project) -> None:
    assert "Nothing to be done" in finished.run(*CI)


def test_the_first_table_is_made_first_and_measurements_last(finished: Project) -> None:
    log = next((finished / ".snakemake/log").glob("*.log")).read_text()
    order = re.findall(r"(Training|Measuring throughput of) (\w+)/", log)
    trained = list(dict.fromkeys(artefact for verb, artefact in order if verb == "Training"))
    assert trained == ["imagenet_methods", "ablations", "ade20k", "reactivation", "coco"]
    kinds = [verb == "Training" for verb, _ in order]
    assert kinds == sorted(kinds, reverse=True), "nothing is timed before the last run has ended"


def test_every_row_finds_its_records(finished: Project) -> None:
    for row in manifest(finished, "imagenet_methods").values():
        assert row["available"] == bool(row["records"])
        for record in [*row["records"], *filter(None, [row["bench"]])]:
            assert (finished / record).is_file()


def test_editing_a_row_reruns_that_row_its_notebook_and_the_report(finished: Project) -> None:
    before = manifest(finished, "ablations")["no_mlp"]["run"]
    finished.edit("config/experiments/ablations.yaml", "options: {mlp: false}", "options: {mlp_ratio: 2.0}")
    expected = {"train": 1, "manifest": 1, "notebook": 1, "report": 1, "reproduce": 1}
    assert finished.planned(*CI) == expected
    finished.run(*CI)
    assert manifest(finished, "ablations")["no_mlp"]["run"] != before
    assert "Nothing to be done" in finished.run(*CI)


def test_editing_a_label_trains_nothing(finished: Project) -> None:
    finished.edit("config/experiments/ablations.yaml", '"Scorer: 16 heads"', '"Scorer: many heads"')
    assert finished.planned(*CI) == {"manifest": 1, "notebook": 1, "report": 1, "reproduce": 1}


def append(project: Project, name: str) -> dict[str, int]:
    """Jobs after a change of a source file."""
    with (project / name).open("a") as file:
        file.write("\n# changed\n")
    return project.planned(*CI)


def test_editing_the_scorer_reruns_the_rows_that_score(finished: Project) -> None:
    runs = {name: row["run"] for name, row in manifest(finished, "imagenet_methods").items()}
    with (finished / "cropr/scorer.py").open("a") as file:
        file.write("\n# changed\n")
    output = finished.dry_run(*CI)
    jobs = counts(output)
    # All Cropr rows (4 of the methods, 9 ablations, 6 of segmentation, 1 of detection) and non-salient; not unpruned,
    # random, variance, attention, small.
    assert (jobs["train"], jobs["bench"], jobs["maps"]) == (21, 8, 4)
    assert "data" not in jobs
    assert "pretrain" not in jobs
    assert runs["cropr_r8_llf"] in output
    assert not [name for name in ("random_r8_llf", "variance_r8_llf", "none") if f"{runs[name]}-seed0.log" in output]


def test_editing_the_training_code_trains_everything_again(finished: Project) -> None:
    jobs = append(finished, "cropr/training/loop.py")
    assert (jobs["pretrain"], jobs["train"], jobs["maps"]) == (3, 32, 11)
    assert "bench" not in jobs
    finished.run(*CI)
    assert finished.planned(*CI) == {}


def test_editing_the_benchmark_trains_nothing(finished: Project) -> None:
    jobs = append(finished, "cropr/bench/throughput.py")
    assert jobs == {"bench": 19, "lab": 9, "notebook": 10, "report": 1, "reproduce": 1}


def test_editing_one_task_reruns_no_other(finished: Project) -> None:
    jobs = append(finished, "cropr/tasks/segmentation.py")
    assert (jobs["pretrain"], jobs["train"], jobs["maps"]) == (1, 10, 4)
    assert not {"bench", "data"} & set(jobs)


def test_editing_a_measurement_of_the_laboratory_reruns_that_kind(finished: Project) -> None:
    assert append(finished, "cropr/bench/profiling.py") == {"lab": 1, "notebook": 1, "report": 1, "reproduce": 1}


def test_editing_the_page_makes_the_page(finished: Project) -> None:
    assert append(finished, "cropr/report/page.py") == {"report": 1, "reproduce": 1}


def test_editing_the_grid_code_reruns_nothing(finished: Project) -> None:
    assert append(finished, "cropr/experiments.py") == {}


def test_editing_a_notebook_reruns_it_and_touching_does_not(finished: Project) -> None:
    notebook = finished / "notebooks/ablations.ipynb"
    os.utime(notebook)
    assert finished.planned(*CI) == {}
    notebook.write_text(notebook.read_text() + " ")
    assert finished.planned(*CI) == {"notebook": 1, "report": 1, "reproduce": 1}


def test_editing_a_published_number_reruns_its_notebook(finished: Project) -> None:
    finished.edit("config/published/ablations.csv", "heads_16,top1,85.2", "heads_16,top1,85.3")
    assert finished.planned(*CI) == {"notebook": 1, "report": 1, "reproduce": 1}


def test_editing_a_claim_reruns_the_notebook_that_decides_it(finished: Project) -> None:
    finished.edit("config/claims.yaml", 'relation: "< 0"', 'relation: "< 1"')
    assert finished.planned(*CI) == {"notebook": 1, "report": 1, "reproduce": 1}


def test_one_ablation_runs_itself_and_its_baseline_and_nothing_else(stubbed: Project) -> None:
    call = ("--config", "scale=ci", "seeds=2", "row=no_mlp", "--", "compare")
    assert stubbed.planned(*call) == {"data": 1, "pretrain": 1, "train": 4, "compare_manifest": 1, "compare": 1}
    output = stubbed.run(*call)
    table = re.search(r"Top-1 \(%\).*", output)
    assert table is not None, output
    assert table[0].count("[") == 3, "two means and a difference with intervals"
    assert "Aggregator: no MLP" in output
    # The same files serve the whole grid: of its 32 runs with two seeds, these 4 are there.
    assert stubbed.planned("--config", "scale=ci", "seeds=2")["train"] == 64 - 4


def test_one_ablation_after_the_whole_table_trains_nothing(finished: Project) -> None:
    jobs = finished.planned("--config", "scale=ci", "row=ablations/sample", "--", "compare")
    assert jobs == {"compare_manifest": 1, "compare": 1}
    finished.run("--config", "scale=ci", "row=ablations/sample", "--", "compare")
    assert finished.planned(*CI) == {}


def test_report_of_snakemake_opens_without_the_workflow(finished: Project) -> None:
    finished.run(*CI, "--report", "provenance.html")
    assert (finished / "provenance.html").stat().st_size > 1e6


# Conda ---------------------------------------------------------------------------------------------------------------


def test_use_conda_without_conda_names_the_pip_path(stubbed: Project, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = stubbed.snakemake("--cores", "2", "--use-conda", env={"PATH": str(tmp_path / "empty")})
    assert result.returncode != 0
    assert "--use-conda needs a program called conda" in result.stdout
    assert "make reproduce, or pip install" in result.stdout


def test_use_conda_with_a_stand_in_runs_which_does_not_prove_that_the_specs_solve(
    stubbed: Project, tmp_path: Path
) -> None:
    conda = tmp_path / "conda-root/conda"
    conda.parent.mkdir()
    body = (Path(__file__).parent / "conda_stand_in.py").read_text().partition("\n")[2]
    conda.write_text(f"#!{sys.executable}\n{body}")
    conda.chmod(0o755)
    path = f"{conda.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "STAND_IN_OUTER": sys.prefix, "PYTHONPATH": "/nowhere"}
    result = stubbed.snakemake("--cores", "all", "--use-conda", "--config", "scale=ci", env=environment)
    assert result.returncode == 0, result.stdout
    calls = (conda.parent / "calls.log").read_text().splitlines()
    created = [call for call in calls if call.startswith("env create")]
    assert len(created) == len(list((stubbed / "envs").glob("*.yaml")))
    assert "Activating conda environment" in result.stdout
    assert shutil.which("conda") is None or shutil.which("conda") != str(conda)
