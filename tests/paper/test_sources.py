"""The digest of a job's code: it changes with the code that the job runs, and with nothing else."""

import ast
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cropr.pruning.methods import REDUCERS
from cropr.tasks import TASKS
from workflow.paper import sources

Edit = Callable[[str, str, str], None]


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    """The digests of the repository, and therefore of an unedited copy."""
    return digests()


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    """Replaces text in a copy of the sources, which the digests are then taken of."""
    for name in ("cropr", "workflow"):
        shutil.copytree(sources.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def forget() -> None:
        for function in vars(sources).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    def replace(name: str, old: str, new: str) -> None:
        file = tmp_path / name
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new, 1), encoding="utf-8")
        forget()

    monkeypatch.setattr(sources, "ROOT", tmp_path)
    forget()
    yield replace
    monkeypatch.undo()
    forget()


def digests() -> dict[str, str]:
    """Digest of a run of every reducer and every task."""
    return {
        f"{task.name}/{method.name}": sources.code_digest("cropr.cli.train", task.run, method.path)
        for task in TASKS.values()
        for method in REDUCERS.values()
    }


def changed(before: dict[str, str]) -> dict[str, set[str]]:
    """Task -> its reducers whose digest is another one now."""
    names = [name.split("/") for name, value in digests().items() if value != before[name]]
    return {task: {reducer for other, reducer in names if other == task} for task, _ in names}


def test_comments_docstrings_and_layout_of_no_file_count(before: dict[str, str], edit: Edit) -> None:
    for file in sources.ROOT.rglob("*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                lines[node.lineno - 1] = lines[node.lineno - 1].replace('"""', '"""Other words. ', 1)
        file.write_text("\n".join(["# A comment.", "", *lines, "# Another."]), encoding="utf-8")
    edit("cropr/pruning/scorer.py", "from __future__", "\n\n# A comment.\nfrom __future__")
    assert digests() == before


def test_the_scorer_concerns_the_reducers_that_score(before: dict[str, str], edit: Edit) -> None:
    edit("cropr/pruning/scorer.py", "\n\n\n", "\n\n\nX = 1\n\n\n")
    assert changed(before)["classification"] == {"cropr", "non_salient"}


def test_a_reducer_concerns_its_own_rows_and_its_label_none(before: dict[str, str], edit: Edit) -> None:
    edit("cropr/pruning/reducers/select.py", '"colour": "#009e73"', '"colour": "#000000"')
    assert digests() == before
    edit("cropr/pruning/reducers/select.py", "class Variance(", "@str\nclass Variance(")
    assert changed(before)["classification"] == {"variance"}


def test_the_training_loop_concerns_all_and_a_task_only_itself(before: dict[str, str], edit: Edit) -> None:
    edit("cropr/data/ade20k.py", "\n\n\n", "\n\n\nX = 1\n\n\n")
    assert set(changed(before)) == {"segmentation"}
    between = digests()
    edit("cropr/training/loop.py", "\n\n\n", "\n\n\nX = 1\n\n\n")
    assert changed(between) == {task: set(REDUCERS) for task in TASKS}


def test_every_reducer_task_and_notebook_module_has_a_digest(before: dict[str, str]) -> None:
    assert all(before.values())
    assert sources.code_digest(*sources.NOTEBOOK_MODULES)
    assert not sources.closure("cropr.cli.train") & sources.NEUTRAL
    with pytest.raises(ValueError, match=r"cropr\.nowhere.*no such source file"):
        sources.code_digest("cropr.nowhere")
