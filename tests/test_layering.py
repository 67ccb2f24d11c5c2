"""Imports point one way, and the light parts stay light (docs of the rules: CONTRIBUTING.md, "Where things go")."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first; a module may import its own package and anything in a lower layer. The longest matching name decides.
LAYERS = (
    {"cropr", "schedule", "tokens", "records", "runtime"},
    {"scorer", "specs", "training.distributed"},
    {"reducers", "fusion", "configuration", "data", "lab_specs"},
    {"backbones", "resolving", "sources"},
    {"model", "experiments"},
    {"tasks", "export"},
    {"training", "report"},
    {"bench"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
# Snakemake builds its DAG from these, the algorithm is what others take into their own project, and the rest of the
# package must install without what only notebooks use.
TORCH_FREE = (
    "schedule",
    "specs",
    "lab_specs",
    "configuration",
    "resolving",
    "experiments",
    "sources",
    "records",
    "cli",
)
ALGORITHM = ("tokens", "scorer", "reducers", "fusion")
FOR_NOTEBOOKS = {"pandas", "matplotlib", "seaborn", "scipy", "IPython"}
FOREIGN = {"snakemake", "papermill", "nbformat", "nbconvert", "nbclient", "jupyter_client", "notebooks", "workflow"}


def name_of(file: Path) -> str:
    """``cropr/reducers/select.py`` -> ``reducers.select``; ``cropr/__init__.py`` -> ``cropr``."""
    parts = file.relative_to(ROOT / "cropr").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "cropr"


MODULES = {name_of(file): file for file in sorted((ROOT / "cropr").rglob("*.py"))}


def imports(source: str, functions: bool = True) -> Iterator[str]:
    """Dotted names that a source imports; ``functions`` False leaves out imports that wait for a call.

    What stands under ``if TYPE_CHECKING`` is for mypy only and left out. ``from a import b`` gives ``a.b``.
    """
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside cropr are written in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        skipped = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not skipped and (functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            waiting.extend(ast.iter_child_nodes(node))


def inner(source: str, functions: bool = True) -> set[str]:
    """Modules of this package that a source imports."""
    found = set()
    for name in imports(source, functions):
        if name.split(".")[0] == "cropr":
            inside = name.removeprefix("cropr").removeprefix(".")
            found.add(next((module for module in (inside, inside.rpartition(".")[0]) if module in MODULES), "cropr"))
    return found


def outer(source: str, functions: bool = True) -> set[str]:
    """Packages other than this one and Python's own that a source imports."""
    return {name.split(".")[0] for name in imports(source, functions)} - set(sys.stdlib_module_names) - {"cropr"}


def layer(module: str) -> int:
    """Position in ``LAYERS``."""
    names = [".".join(module.split(".")[:length]) for length in range(len(module.split(".")), 0, -1)]
    found = (position for name in names for position, members in enumerate(LAYERS) if name in members)
    return next(found, -1)


def belongs(module: str, packages: tuple[str, ...]) -> bool:
    return module.split(".")[0] in packages


def test_reads_imports() -> None:
    source = (
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\ndef f():\n    import g\nclass H:\n    import i\n"
        "from cropr import fusion, nothing\nfrom cropr.pruning.reducers.base import Reducer\n"
    )
    assert set(imports(source)) >= {"a.b", "c.d", "g", "i"}
    assert outer(source) == {"a", "c", "g", "i"}
    assert outer(source, functions=False) == {"a", "c", "i"}
    assert inner(source) == {"fusion", "cropr", "reducers.base"}


def test_layer_is_the_longest_match() -> None:
    assert layer("training.distributed") < layer("tasks.classification") < layer("training.loop")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert layer(module) >= 0, f"cropr.{module} is in no layer: give it one in LAYERS"
    if module == "cropr":  # gathers names from above, but only when they are asked for
        assert inner(MODULES[module].read_text(), functions=False) == {"schedule"}
        return
    package = module.split(".")[0]
    upward = {
        other
        for other in inner(MODULES[module].read_text())
        if layer(other) >= layer(module) and other.split(".")[0] != package
    }
    assert not upward, f"cropr.{module} imports {sorted(upward)}, which is not in a layer below it"


@pytest.mark.parametrize("module", [name for name in MODULES if belongs(name, ALGORITHM)])
def test_algorithm_needs_torch_only(module: str) -> None:
    assert outer(MODULES[module].read_text()) <= {"torch"}


@pytest.mark.parametrize("module", MODULES)
def test_no_workflow_in_the_library(module: str) -> None:
    found = outer(MODULES[module].read_text())
    assert not found & FOREIGN
    if not belongs(module, ("report",)):
        assert not found & FOR_NOTEBOOKS, "tables and figures belong in cropr/report"


def test_light_imports_load_no_torch() -> None:
    modules = ", ".join(["cropr", *(f"cropr.{name}" for name in TORCH_FREE)])
    code = f"import sys, {modules}; print(*{{'torch', 'timm', 'numpy', 'pandas'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_report_is_for_notebooks_and_commands() -> None:
    users = {
        module.split(".")[0]
        for module, file in MODULES.items()
        if any(belongs(other, ("report",)) for other in inner(file.read_text()))
    }
    assert users <= {"report", "commands"}
