"""Which source files a result depends on, and their digest: a job runs again when what its own files do changes.

Snakemake does not see what a command imports, so rules put ``code_digest(...)`` in their ``params``. The files are
found by walking the imports from the module that a job runs.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

NEUTRAL = frozenset(
    {
        "cropr",
        "cropr.cli",
        "cropr.cli.output",
        "cropr.cli.spec_flags",
        "cropr.bench.specs",
        "cropr.pruning.methods",
        "cropr.records",
        "cropr.specs",
        "cropr.tasks",
        "cropr.tasks.table",
        "cropr.tasks.classification",
        "cropr.tasks.detection",
        "cropr.tasks.segmentation",
        "cropr.training.specs",
        "workflow",
        "workflow.paper",
        "workflow.paper.configuration",
        "workflow.paper.grid",
        "workflow.paper.resolving",
        "workflow.paper.sources",
    }
)
"""Modules whose decisions reach a job as text: its specification and its command line. They are left out."""


def code_digest(*modules: str | None) -> str:
    """Ten hex digits of what the files behind a job do: comments, docstrings and layout do not count.

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


def closure(*modules: str) -> set[str]:
    """The modules themselves and all that they import of this repository, without ``NEUTRAL``.

    Raises:
        ValueError: no such module.
    """
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if _file(module) is None:
            raise ValueError(f"module {module!r}: no such source file under {ROOT}")
        if module not in seen and module not in NEUTRAL:
            seen.add(module)
            waiting += imports(module)
    return seen


@cache
def imports(module: str) -> tuple[str, ...]:
    """Modules of this repository that one imports when it runs; packages on the way to them among them."""
    file = _file(module)
    assert file is not None
    found: dict[str, None] = {}
    for node in _running(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in ("cropr", "workflow") and _file(name) is not None:
                found[name] = None
    return tuple(found)


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
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
