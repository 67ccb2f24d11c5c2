"""Size and direction: what imports what, and how long files, functions and packages are (CONTRIBUTING.md)."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from cropr.pruning.methods import REDUCERS
from cropr.tasks import TASKS
from workflow.paper.sources import NOTEBOOK_MODULES, closure, imports

ROOT = Path(__file__).parents[1]
LINES = {"cropr": 11_000, "cropr/pruning": 3_000, "workflow": 6_000, "tests": 10_500}
"""Lines of .py and .smk files, at most."""
FILE, FUNCTION = 400, 60
ONE_ROW = 39
"""Modules that a reader enters who follows one row from its YAML to its table, at most."""
LAYERS = ("pruning", "specs", "data", "tasks", "training", "bench", "cli")
"""Packages and modules of ``cropr``, lowest first: each imports only itself and those before it."""
TORCH_FREE = (
    "cropr", "cropr.specs", "cropr.__main__", "cropr.records", "cropr.bench.specs", "cropr.tasks",
    "workflow.paper", "workflow.paper.grid", "workflow.paper.microbench", "workflow.paper.sources",
)  # fmt: skip


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files(folder: str, *suffixes: str) -> list[Path]:
    return sorted(file for suffix in suffixes for file in (ROOT / folder).rglob(f"*{suffix}"))


MODULES = {module_of(file): file for folder in ("cropr", "workflow") for file in files(folder, ".py")}
LIBRARY = [name for name in MODULES if name.startswith("cropr")]


def foreign(file: Path) -> set[str]:
    """Packages that a file imports, other than this repository's and Python's own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"cropr", "workflow"}


def layer(module: str) -> int:
    """Position in ``LAYERS``; -1 for what any module may import. Specs and tables of tasks belong to the specs."""
    table = module in ("cropr.tasks", *(f"cropr.tasks.{name}" for name in TASKS))
    part = "specs" if table or module.endswith(".specs") else f"{module}.".split(".")[1]
    return LAYERS.index(part) if part in LAYERS else -1


def test_library_imports_nothing_of_the_reproduction() -> None:
    assert [module for module in LIBRARY if any(name.startswith("workflow") for name in imports(module))] == []
    notebooks = {"pandas", "matplotlib", "seaborn", "great_tables", "scipy", "snakemake", "papermill", "nbformat"}
    assert [module for module in LIBRARY if foreign(MODULES[module]) & notebooks] == []


def test_core_imports_torch_alone_and_its_backbones_their_host() -> None:
    for module in (name for name in LIBRARY if name.startswith("cropr.pruning")):
        hosts = {"timm", "torchvision", "open_clip"} if module.startswith("cropr.pruning.backbones") else set()
        assert foreign(MODULES[module]) <= {"torch"} | hosts, module
        assert all(name == "cropr" or name.startswith("cropr.pruning") for name in imports(module)), module


def test_imports_point_to_lower_layers_and_never_in_a_circle() -> None:
    layered = [module for module in LIBRARY if layer(module) >= 0]
    assert [(one, name) for one in layered for name in imports(one) if layer(name) > layer(one)] == []
    try:
        TopologicalSorter({module: set(imports(module)) - {module} for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_what_builds_the_graph_loads_no_torch() -> None:
    code = f"import sys, {', '.join(TORCH_FREE)}; print(*{{'torch', 'timm', 'numpy', 'pandas'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout.split(), result.returncode) == ([], 0), result.stderr


def test_few_modules_lie_on_the_way_of_one_row() -> None:
    entries = ["workflow.paper.grid", "workflow.paper.sources", "cropr.__main__", "cropr.cli.train"]
    entries += [TASKS["classification"].run.partition(":")[0], str(REDUCERS["cropr"].module)]
    entries += ["cropr.pruning.backbones.vit", *NOTEBOOK_MODULES]
    found = closure(*entries, without=frozenset(), by_name=False)
    assert len(found) <= ONE_ROW, sorted(found)


def test_files_and_functions_are_short() -> None:
    sources = [file for folder in ("cropr", "workflow", "tests") for file in files(folder, ".py", ".smk")]
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in sources}
    assert {name: length for name, length in lengths.items() if length > FILE} == {}
    functions = {
        f"{file.name}: {node.name}": int(node.end_lineno or 0) - node.lineno + 1
        for file in sources
        if file.suffix == ".py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: length for name, length in functions.items() if length > FUNCTION} == {}


@pytest.mark.parametrize("folder", LINES)
def test_packages_are_small(folder: str) -> None:
    length = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files(folder, ".py", ".smk"))
    assert length <= LINES[folder]
