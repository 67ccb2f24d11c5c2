"""The conda path and the pip path name the same versions.

That the specs solve is NOT shown: it takes conda's channels.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from rattler import MatchSpec

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "environment.yml", *sorted((ROOT / "envs").glob("*.yaml"))]
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
"""Conda package -> its name on PyPI, where they differ."""
CONDA_ONLY = {"python", "snakemake-executor-plugin-slurm"}


def specs(file: Path) -> list[str]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))["dependencies"]


def locked() -> dict[str, str]:
    """Package -> version in requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return dict(re.match(r"([\w.-]+)==([^\s;]+)", line).groups() for line in lines if re.match(r"[\w.-]+==", line))  # type: ignore[union-attr]


def required(*extras: str) -> set[str]:
    """Packages that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return {re.split(r"[\s\[<>=!;]", entry)[0] for entry in wanted} - {"cropr"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_conda_specs_parse_and_pin_what_pip_pins_which_does_not_prove_that_they_solve(file: Path) -> None:
    pins = locked()
    for spec in specs(file):
        assert MatchSpec(spec, strict=True).name is not None
        name, _, version = spec.partition(" ")
        assert name in CONDA_ONLY or version == f"={pins[CONDA_NAMES.get(name, name)]}", spec
    channels = yaml.safe_load(file.read_text(encoding="utf-8"))["channels"]
    assert (channels[0], channels[-1]) == ("conda-forge", "nodefaults")


def test_every_environment_is_used_by_a_rule_and_every_job_finds_what_the_package_requires() -> None:
    rules = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "workflow/rules").glob("*.smk"))
    assert set(re.findall(r"envs/(\w+\.yaml)", rules)) == {file.name for file in (ROOT / "envs").glob("*.yaml")}

    def names(file: str) -> set[str]:
        found = {spec.partition(" ")[0] for spec in specs(ROOT / "envs" / file)}
        return {CONDA_NAMES.get(name, name) for name in found}

    assert names("train.yaml") >= required("scenes", "detection")
    runner = {"ipykernel", "latex2mathml", "nbconvert", "nbformat", "papermill"}
    torch = {"torch", "torchvision", "timm", "safetensors", "pillow"}
    assert names("report.yaml") >= required("report") - torch | runner


@pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="needs the environment that make sets up")
def test_notebooks_find_the_reproduction_with_the_kernel_of_venv() -> None:
    call = [ROOT / ".venv/bin/python", "-c", "import workflow.paper, sys; sys.stdout.write(workflow.paper.__file__)"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(call, cwd=ROOT / "notebooks", env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout).is_relative_to(ROOT)
