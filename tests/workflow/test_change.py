"""How many files a change touches: toys are added to a copy of the repository, which must then know them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from project import Project

pytestmark = pytest.mark.workflow

REDUCER = '''"""Keeps the patches with the largest values."""

from __future__ import annotations

from cropr.pruning.reducers.select import Random

METHODS = {"loudest": {"class": "Loudest", "label": "Loudest"}}


class Loudest(Random):
    """Random, under another name."""
'''
ROW = "  - {row: loudest, label: Loudest, reducer: loudest, schedule: r8, fusion: llf}\n"
ARTEFACT = """order: 99
section: Classification
title: Toy
question: Is this a table?
rows:
  - {row: none, label: No pruning, use: imagenet_methods/none}
"""
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


def contents(project: Project) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in project.path.rglob("*") if file.is_file() and file.suffix != ".pyc"}


def python(project: Project, code: str) -> str:
    """What a program prints that runs in the copy."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=project.path, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def add(project: Project, changes: dict[str, str]) -> int:
    """Append to files, or make them; the number of files that differ."""
    before = contents(project)
    for name, text in changes.items():
        with (project / name).open("a", encoding="utf-8") as file:
            file.write(text)
    after = contents(project)
    return sum(after.get(file) != before.get(file) for file in before.keys() | after.keys())


def test_a_reducer_is_its_module_and_a_row(project: Project) -> None:
    changes = {"cropr/pruning/reducers/toy.py": REDUCER, "config/experiments/imagenet_methods.yaml": ROW}
    assert add(project, changes) == 2
    code = (
        "import timm, torch, cropr; from workflow.paper.grid import load_grid\n"
        "row = load_grid('config', 'ci').artefacts['imagenet_methods']['loudest']\n"
        "print(row.reducer, len(row.records))\n"
        "vit = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=3, num_classes=2)\n"
        "model = cropr.prune(vit, schedule=cropr.Schedule.constant(rate=4), reducer='loudest')\n"
        "print(*model.eval()(torch.zeros(1, 3, 64, 64)).logits.shape)"
    )
    assert python(project, code).split() == ["loudest", "1", "1", "2"]
    help_text = python(
        project, "import sys; sys.argv = ['cropr', 'bench', '--help']; from cropr.__main__ import main; main()"
    )
    assert "loudest" in help_text


def test_a_table_is_its_yaml_and_its_notebook(project: Project) -> None:
    notebook = json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    assert add(project, {"config/experiments/toy.yaml": ARTEFACT, "notebooks/toy.ipynb": notebook}) == 2
    assert "Running notebook toy" in project.run("--dry-run", "--config", "scale=ci", "--", "toy")


def test_a_backbone_is_one_adapter(project: Project) -> None:
    assert add(project, {"cropr/pruning/backbones/toy.py": BACKBONE}) == 1
    code = (
        "from cropr.pruning.backbones import adapt; from cropr.pruning.backbones.toy import Host\n"
        "from workflow.paper.sources import closure\n"
        "print(type(adapt(Host())).__name__, 'cropr.pruning.backbones.toy' in closure('cropr.pruning.model'))"
    )
    assert python(project, code).split() == ["Adapter", "True"]
