"""What a repository owes its readers: small files, no traces of a machine, commands that exist, files that parse."""

import csv
import json
import os
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rattler import MatchSpec

ROOT = Path(__file__).parents[1]

# Weights that spare the laptop scale its pretraining; they may take 7 MB, nothing else more than 2.
WEIGHTS = re.compile(r"assets/laptop_\w+\.safetensors")
IGNORED = re.compile(r"\.(venv|git|snakemake|ipynb_checkpoints|\w+_cache)|results|build|dist|__pycache__|.*\.egg-info")

# Folders of somebody's machine (a path that a reader is to replace begins with /data or /path), and package indexes.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|Users|root|work|opt|mnt|srv|private|tmp)/\w")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONDA_FILES = [ROOT / "environment.yml", *sorted((ROOT / "envs").glob("*.yaml"))]
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
"""Conda package -> its name on PyPI, where they differ."""
CONDA_ONLY = {"python", "snakemake-executor-plugin-slurm"}
INDEX_OPTION = re.compile(r"--?(?:extra-)?index-url|--find-links|--trusted-host|^-[if] ", re.MULTILINE)


@cache
def files() -> tuple[Path, ...]:
    """What git tracks or would track; outside a checkout (a release archive), all files that are not generated."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode == 0 and result.stdout:
        found = [ROOT / name for name in result.stdout.split("\0") if name]
    else:
        found = [path for path in ROOT.rglob("*") if not any(map(IGNORED.fullmatch, path.relative_to(ROOT).parts))]
    return tuple(path for path in sorted(found) if path.is_file())


def texts() -> list[tuple[str, str]]:
    """Name and content of every text file but this one, which spells out what is forbidden."""
    found = []
    for path in files():
        content = path.read_bytes()
        if b"\0" not in content and path != Path(__file__):
            found.append((str(path.relative_to(ROOT)), content.decode("utf-8")))
    return found


def with_suffix(*suffixes: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in files() if path.suffix in suffixes]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def documents() -> list[Path]:
    return [path for path in files() if path.suffix == ".md" and "rendered" not in path.parts]


def test_files_are_small_and_those_that_are_expected_are_there() -> None:
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in files()}
    limits = {name: 7_000_000 if WEIGHTS.fullmatch(name) else 2_000_000 for name in sizes}
    assert [f"{name}: {size} bytes" for name, size in sizes.items() if size > limits[name]] == []
    assert {"LICENSE", "CITATION.cff", "CONTRIBUTING.md", "README.md", "requirements.lock", ".ci/run"} <= set(sizes)
    assert (ROOT / ".ci/run").stat().st_mode & 0o100, ".ci/run must be executable"


@pytest.mark.parametrize("forbidden", [MACHINE_PATH, INDEX_OPTION], ids=["machine paths", "package indexes"])
def test_files_hold_no_traces_of_a_machine(forbidden: re.Pattern[str]) -> None:
    assert [f"{name}: {match.group()}" for name, text in texts() if (match := forbidden.search(text))] == []


def test_data_files_parse_and_tables_are_rectangular() -> None:
    for name in with_suffix(".yaml", ".yml", ".cff"):
        assert yaml.safe_load((ROOT / name).read_text(encoding="utf-8")) is not None, name
    for name in with_suffix(".json", ".ipynb"):
        assert json.loads((ROOT / name).read_text(encoding="utf-8")), name
    for name in with_suffix(".csv"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        rows = list(csv.reader(line for line in lines if not line.startswith("#")))
        assert rows, name  # heads alone where nothing was measured
        assert {len(row) for row in rows} == {len(set(rows[0]))}, f"{name}: ragged, or two columns of the same name"


def test_make_help_lists_every_public_target_and_the_readme_opens_with_two() -> None:
    documented = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert documented == make_targets() >= {"help", "reproduce", "test", "fast", "lint", "ablation", "clean"}
    commands = re.findall(r"make [a-z]+", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert commands[:2] == ["make reproduce", "make test"]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_links_of_documents_lead_somewhere_and_no_number_is_left_to_fill_in(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:^|`|&& |\$ )make ([a-z]+)", text, re.MULTILINE)) <= make_targets()
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not re.findall(r"@[A-Z_]+@|\bTODO\b|\bTBD\b", text)


def locked() -> dict[str, str]:
    """Package -> version in requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; platform_system == \"Linux\")?", line), line
    pins = dict(line.partition(" ;")[0].split("==") for line in lines)
    assert len(pins) == len(lines)
    return pins


def required(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for."""
    project = PROJECT["project"]
    lines = sum((project["optional-dependencies"][name] for name in extras), project["dependencies"])
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "cropr"]


def test_lock_pins_everything_within_the_ranges_of_pyproject() -> None:
    pins = locked()
    for requirement in required(*set(PROJECT["project"]["optional-dependencies"]) - {"slurm"}):
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} but requirements.lock has {pin}"


def conda_specs(file: Path) -> list[str]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))["dependencies"]


@pytest.mark.parametrize("file", CONDA_FILES, ids=lambda file: file.name)
def test_conda_specs_parse_and_pin_what_pip_pins_which_does_not_prove_that_they_solve(file: Path) -> None:
    pins = locked()
    for spec in conda_specs(file):
        assert MatchSpec(spec, strict=True).name is not None
        name, _, version = spec.partition(" ")
        assert name in CONDA_ONLY or version == f"={pins[CONDA_NAMES.get(name, name)]}", spec
    channels = yaml.safe_load(file.read_text(encoding="utf-8"))["channels"]
    assert (channels[0], channels[-1]) == ("conda-forge", "nodefaults")


def test_every_environment_is_used_by_a_rule_and_every_job_finds_what_the_package_requires() -> None:
    rules = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "workflow/rules").glob("*.smk"))
    assert set(re.findall(r"envs/(\w+\.yaml)", rules)) == {file.name for file in (ROOT / "envs").glob("*.yaml")}

    def names(file: str) -> set[str]:
        return {CONDA_NAMES.get(name := spec.split()[0], name) for spec in conda_specs(ROOT / "envs" / file)}

    assert names("train.yaml") >= {one.name for one in required("scenes", "detection")}
    runner = {"ipykernel", "latex2mathml", "nbconvert", "nbformat", "papermill"}
    torch = {"torch", "torchvision", "timm", "safetensors", "pillow"}
    assert names("report.yaml") >= {one.name for one in required("report")} - torch | runner


@pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="needs the environment that make sets up")
def test_notebooks_find_the_reproduction_with_the_kernel_of_venv() -> None:
    call = [ROOT / ".venv/bin/python", "-c", "import workflow.paper, sys; sys.stdout.write(workflow.paper.__file__)"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(call, cwd=ROOT / "notebooks", env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout).is_relative_to(ROOT)


def test_the_package_is_the_library_alone_and_typed() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    assert setuptools["packages"]["find"]["include"] == ["cropr", "cropr.*"]
    assert setuptools["package-data"] == {"cropr": ["py.typed"]}
    assert (ROOT / "cropr/py.typed").is_file()
    assert sum(file.stat().st_size for file in (ROOT / "cropr").rglob("*.py")) < 1_000_000  # a wheel of 400 kB


def test_every_page_of_the_site_exists_and_the_api_page_names_modules() -> None:
    pages = [page for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for page in entry.values()]
    assert [page for page in pages if not (ROOT / "docs" / page).is_file()] == []
    assert set(pages) == {path.name for path in (ROOT / "docs").glob("*.md")}
    modules = re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert [name for name in modules if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()] == []


def test_links_of_rendered_notebooks_lead_somewhere() -> None:
    for path in (path for path in files() if "rendered" in path.parts and path.suffix in (".md", ".ipynb")):
        links = re.findall(r"\]\(([\w./-]+\.(?:md|ipynb))", path.read_text(encoding="utf-8"))
        assert [link for link in links if not (path.parent / link).exists()] == [], path
