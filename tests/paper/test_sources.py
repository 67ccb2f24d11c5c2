"""Source files behind a job: every file that it imports decides whether it runs again."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from cropr.specs import REDUCERS, PruneSpec, Task
from workflow.paper.sources import BY_REDUCER, BY_TASK, NEUTRAL, PACKAGE, SOURCES, code_digest, source_files


def imports_of(file: Path) -> set[Path]:
    """Files of the package that a file imports when it runs, at the top or within functions."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    never = {id(node) for hint in hints for node in ast.walk(hint)}
    for node in ast.walk(tree):
        if id(node) in never:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cropr":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "cropr"]
        else:
            continue
        for name in names:
            path = PACKAGE.joinpath(*name.split(".")[1:])
            found |= {candidate for candidate in (path.with_suffix(".py"), path / "__init__.py") if candidate.is_file()}
    return found


def closure(entry: Path) -> set[Path]:
    """What a file imports, directly or not, without what is neutral and what only that imports."""
    seen: set[Path] = set()
    todo = [entry]
    while todo:
        file = todo.pop()
        if file not in seen and file.relative_to(PACKAGE).as_posix() not in NEUTRAL:
            seen.add(file)
            todo += imports_of(file)
    return seen


@pytest.mark.parametrize(
    ("kind", "entry"),
    [("data", "commands/data.py"), ("train", "commands/train.py"), ("bench", "commands/bench.py"),
     ("sweep", "bench/sweep.py"), ("blocks", "bench/alignment.py"), ("profile", "bench/profiling.py"),
     ("scoring", "bench/scoring.py"), ("bench_detector", "bench/heads.py"),
     ("training", "bench/training_step.py"), ("sweep", "commands/lab.py"), ("plan", "commands/plan.py"),
     ("maps", "commands/show.py"), ("report", "report/page.py")],
)  # fmt: skip
def test_every_file_that_a_job_imports_is_digested_or_neutral(kind: str, entry: str) -> None:
    digested = set(source_files(SOURCES[kind]))
    for patterns in [*BY_REDUCER.values(), *(BY_TASK.values() if kind in ("train", "maps") else ())]:
        digested |= set(source_files(patterns))
    for file in closure(PACKAGE / entry):
        if kind == "maps" and file.parent.name == "report":
            continue  # draws pictures for its --picture, which the workflow does not ask for
        name = file.relative_to(PACKAGE).as_posix()
        assert file in digested, f"{kind}: {name}"


@pytest.mark.parametrize("task", BY_TASK)
def test_every_file_that_a_task_imports_is_digested_with_it(task: Task) -> None:
    """Tasks are imported by name, when they are opened."""
    digested = set(source_files((*SOURCES["train"], *BY_TASK[task], *BY_REDUCER["cropr"])))
    for entry in source_files(BY_TASK[task]):
        missing = {file.relative_to(PACKAGE).as_posix() for file in closure(entry) - digested}
        assert not missing - {"reducers/select.py"}, task


@pytest.mark.parametrize("task", BY_TASK)
def test_every_file_that_maps_of_a_task_import_is_digested_with_them(task: Task) -> None:
    digested = set(source_files((*SOURCES["maps"], *BY_TASK[task], *BY_REDUCER["cropr"])))
    assert not closure(PACKAGE / f"tasks/views/{task}.py") - digested


def test_how_maps_are_made_trains_nothing_again() -> None:
    trained = {file for task in BY_TASK for file in source_files((*SOURCES["train"], *BY_TASK[task]))}
    assert not trained & set(source_files(("tasks/views/*.py", "commands/show.py")))


def test_a_task_does_not_rerun_another() -> None:
    assert not set(source_files(BY_TASK["segmentation"])) & {PACKAGE / "tasks/classification.py"}
    assert code_digest("train", PruneSpec(), "classification") != code_digest("train", PruneSpec(), "segmentation")


def test_every_reducer_says_where_its_source_is() -> None:
    assert set(BY_REDUCER) == set(REDUCERS)


def test_code_of_one_reducer_concerns_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PACKAGE / "scorer.py" in source_files(BY_REDUCER["cropr"])
    assert PACKAGE / "scorer.py" not in source_files(BY_REDUCER["random"])
    rate = {"constant": {"rate": 8}}
    digests = {name: code_digest("train", PruneSpec(reducer=name, schedule=rate)) for name in ("cropr", "random")}
    assert digests["cropr"] != digests["random"]
    assert code_digest("train", PruneSpec()) not in digests.values()


def test_a_source_that_is_not_there_is_reported() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        source_files(("nowhere/*.py",))
