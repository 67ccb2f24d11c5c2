"""``python -m cropr doctor``: what a bug report needs, the problems, and nothing else of the environment."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from torch.utils import collect_env

from cropr.__main__ import main
from cropr.cli.doctor import collect, find_problems, measure_loader


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with one data root that exists and one that does not."""
    (tmp_path / "images").mkdir()
    file = tmp_path / "config.yaml"
    file.write_text(f"imagenet: {tmp_path / 'images'}\nfolder: {tmp_path / 'nowhere'}\n")
    return file


def test_json_holds_what_a_bug_report_needs_and_nothing_else_of_the_environment(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hush-hush")
    monkeypatch.setenv("CONDA_PREFIX", "secret-folder")
    assert main(["doctor", "--json", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert not re.search("hush-hush|secret-folder", shown)
    report = json.loads(shown)
    assert {"cropr", "commit", "python", "torch", "torchvision", "timm", "snakemake"} <= set(report["software"])
    assert report["software"]["conda_environment_active"] is True
    assert report["torch"]["threads"] == 1  # as conftest.py sets it
    assert {"os", "cuda_compiled_version", "is_cuda_available"} <= set(report["torch"])
    assert report["machine"]["cores_usable"] >= 1
    roots = report["folders"]["data_roots"]
    assert (roots["imagenet"]["readable"], roots["folder"]["readable"]) == (True, False)


def test_missing_data_root_is_a_problem(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_env, "get_env_info", lambda: SimpleNamespace(_asdict=dict))  # it would ask pip
    assert any("nowhere.yaml" in problem for problem in find_problems(collect(tmp_path / "nowhere.yaml", tmp_path)))
    before = sorted(tmp_path.rglob("*"))
    problems = "\n".join(find_problems(collect(config, tmp_path / "a/b/results")))
    assert sorted(tmp_path.rglob("*")) == before  # it looks and writes nothing
    assert re.search("folder.*nowhere", problems)
    assert not re.search("cannot be written|imagenet", problems)


def test_works_without_torch(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` fail
    assert main(["doctor", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "torch cannot be imported" in shown
    assert "cores_usable" in shown


def test_the_loader_alone_is_measured(tmp_path: Path) -> None:
    found = measure_loader(tiny.write_folder(tmp_path), "imagenet", workers=0, seconds=0.05)
    assert found["images_per_s"] > 0
