"""The source files that a job depends on, and their digest: a job runs again if its own code changes.

Snakemake does not see what a command imports, so rules put ``code_digest(...)`` in their ``params``.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

_GRID_SIDE = ("configuration", "grid", "resolving", "sources")
_NO_NOTEBOOK = ("__init__", "compare", "page", "snapshot", *_GRID_SIDE)
NEUTRAL = frozenset(
    {
        "cropr",
        "cropr.bench.specs",
        "cropr.cli",
        "cropr.cli.pruning_flags",
        "cropr.cli.spec_flags",
        "cropr.pruning.methods",
        "cropr.records",
        "cropr.specs",
        "cropr.tasks",
        "cropr.tasks.classification",
        "cropr.tasks.detection",
        "cropr.tasks.segmentation",
        "cropr.tasks.table",
        "cropr.training.specs",
        "workflow",
        "workflow.paper",
        *(f"workflow.paper.{name}" for name in _GRID_SIDE),
    }
)
"""Modules whose decisions reach a job as text, in its specification and its command line. A digest leaves them out."""

SCANNED = ("cropr.pruning.backbones",)
"""Packages that import all their modules by scanning their folder."""

NOTEBOOK_MODULES = tuple(
    f"workflow.paper.{file.stem}"
    for file in sorted((ROOT / "workflow/paper").glob("*.py"))
    if file.stem not in _NO_NOTEBOOK
)
"""Modules that a notebook may use: ``workflow.paper`` imports them when they are asked for."""


def code_digest(*modules: str | None) -> str:
    """Ten hex digits of the code behind a job: comments, docstrings and layout do not count.

    Args:
        modules: dotted names that the job runs. What they import counts too, at the top of a file or in a function.
            What a job finds by name (its reducer, its task) must be given as well. None is left out.

    Raises:
        ValueError: no such module.
    """
    digest = hashlib.sha256()
    for module in sorted(closure(*filter(None, modules))):
        digest.update(f"{module}\0{_code(_file(module))}\0".encode())
    return digest.hexdigest()[:10]


def closure(*modules: str, without: frozenset[str] = NEUTRAL) -> set[str]:
    """The modules and all that they import of this repository, except ``without`` and what only those import.

    Raises:
        ValueError: no such module.
    """
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if _file(module) is None:
            raise ValueError(f"module {module!r}: no such source file under {ROOT}")
        if module not in seen and module not in without:
            seen.add(module)
            waiting += imports(module)
    return seen


@cache
def imports(module: str) -> tuple[str, ...]:
    """Modules of this repository that a module imports when it runs, not those under ``if TYPE_CHECKING``."""
    file = _file(module)
    assert file is not None
    names: list[str] = []
    for node in _running(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    if module in SCANNED:
        names += [f"{module}.{beside.stem}" for beside in sorted(file.parent.glob("*.py")) if beside != file]
    ours = (name for name in names if name.split(".")[0] in ("cropr", "workflow") and _file(name) is not None)
    return tuple(dict.fromkeys(ours))


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            yield node
            yield from _running(node)


@cache
def _code(file: Path) -> str:
    """A file's syntax tree without docstrings and other strings that stand alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [  # type: ignore[attr-defined]
                item for item in body if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))
            ]
    return ast.dump(tree)


@cache
def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
