"""What a cluster is asked for, and what a failed or stopped job leaves."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from project import ROOT, Project

from cropr.tasks import TASKS
from workflow.paper.configuration import JobsBlock
from workflow.paper.cost import estimate
from workflow.paper.launch import launcher, resources, shares

SLURM = ROOT / "profiles/slurm/config.yaml"
PRINT = """
for one in workflow.rules:
    names = ("gpu", "slurm_partition", "slurm_extra", "_cores")
    print("RULE", one.name, *(getattr(one.resources.get(name), "raw", None) for name in names))
"""


@pytest.mark.workflow
@pytest.mark.parametrize("gpus", [1, 8])
def test_every_job_of_the_paper_fits_its_partition(project: Project, tmp_path: Path, gpus: int) -> None:
    """The profile without its executor, which needs the plugin."""
    profile = yaml.safe_load(SLURM.read_text())
    kept = {key: value for key, value in profile.items() if key != "executor" and not key.startswith("slurm-")}
    for folder in {name for task in TASKS.values() for name in task.folders}:
        (tmp_path / "data" / folder / "class").mkdir(parents=True, exist_ok=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(kept))
    (tmp_path / "own.yaml").write_text(f"overrides: {{jobs: {{gpus: {gpus}, threads: 16}}}}")
    with (project / "Snakefile").open("a") as file:
        file.write(PRINT)
    roots = [f"{task.layout}={tmp_path / 'data'}" for task in TASKS.values()]
    call = ["--workflow-profile", str(tmp_path), "--configfile", str(tmp_path / "own.yaml")]
    result = project.snakemake("--cores", "64", "--dry-run", *call, "--config", "scale=paper", *roots)
    assert result.returncode == 0, result.stdout
    lines = re.findall(r"^RULE (\S+) (\S+) (\S+) (\S+) (\S+)$", result.stdout, re.MULTILINE)
    found = {rule: told for rule, *told in lines}
    on_gpu = {rule: int(told[0]) for rule, told in found.items() if told[0] != "None"}
    assert on_gpu == {"pretrain": gpus, "train": gpus, "bench": 1, "microbench": 1}
    assert {rule for rule, told in found.items() if told[1] == "gpu"} == set(on_gpu)
    assert {told[1] for told in found.values()} == {"gpu", "cpu"}
    assert {rule for rule, told in found.items() if told[2] == "--exclusive"} == {"bench", "microbench"}
    assert (found["train"][3], found["bench"][3], found["microbench"][3]) == ("16", "8", "8")


def test_a_run_has_a_process_a_gpu_and_workers_for_all_other_threads() -> None:
    assert (launcher(JobsBlock()), shares(JobsBlock(), 2)) == ("python", "--threads 2 --workers 0")
    assert (launcher(JobsBlock(gpus=1)), shares(JobsBlock(gpus=1), 12)) == ("python", "--threads 12 --workers 11")
    many = JobsBlock(gpus=8, nodes=2)
    assert "torch.distributed.run --nproc-per-node 8 --nnodes 2" in launcher(many)
    assert shares(many, 96) == "--threads 12 --workers 11"
    assert resources(many) == {"gpu": 16, "nodes": 2, "tasks": 2, "mpi": "srun"}
    with pytest.raises(ValueError, match=r"nodes = 2 without jobs\.gpus"):
        launcher(JobsBlock(nodes=2))


def attempt(number: int, log: Path, code: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "workflow.paper.launch", str(number), str(log), sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def test_logs_of_attempts_are_kept_and_own_failures_are_not_repeated(tmp_path: Path) -> None:
    log = tmp_path / "logs/job.log"
    assert attempt(1, log, "print('stopped'); raise SystemExit(143)").wait() == 143
    assert attempt(2, log, "print('wrong'); raise SystemExit(2)").wait() == 2
    assert attempt(3, log, "print('again')").wait() == 2
    assert [file.read_text() for file in (log, tmp_path / "logs/job.log.1")] == ["wrong\n", "stopped\n"]
    assert attempt(1, log, "print('a new call')").wait() == 0
    with attempt(1, log, "print('ready', flush=True); import time; time.sleep(60)") as process:
        while "ready" not in log.read_text():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert attempt(2, log, "print('continued')").wait() == 0


def test_the_cost_of_the_paper_is_that_of_its_published_runs() -> None:
    rows = {row["artefact"]: row for row in estimate("paper")}
    assert rows["memory"]["runs"] == 0
    table = rows["imagenet_methods"]
    assert table["runs"] > 10
    assert 0.8 * 33.6 * table["runs"] < table["hours"] < 1.1 * 49.5 * table["runs"]
    assert rows["coco"]["hours"] > 100
    assert rows["memory"]["hours"] == 0
