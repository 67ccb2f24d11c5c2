"""How many files a change touches: toys are added to a copy of the repository, which must then know them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT, Project

pytestmark = pytest.mark.workflow

PAGE = (ROOT / "docs/how_to.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
"""Files that the how-tos add, by their path."""
COMMANDS = [
    line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()
]
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
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=project.path, capture_output=True, text=True, timeout=300, check=False
    )
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
        if "-- compare" in command or command.endswith("-n"):  # stubs write no images to compare
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
