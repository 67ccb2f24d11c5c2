"""The source files that a job depends on, and their digest: a job runs again if its own code changes.

Snakemake does not see what a command imports, so rules put ``code_digest(...)`` in their ``params``.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

_GRID_SIDE = ("configuration", "grid", "resolver", "sources")
_NO_NOTEBOOK = ("__init__", "compare", "cost", "launch", "page", "snapshot", "verify", *_GRID_SIDE)
NEUTRAL = frozenset(
    {
        "cropr",
        "cropr.bench.specs",
        "cropr.cli.spec_flags",
        "cropr.pruning.methods",
        "cropr.records",
        "cropr.specs",
        "cropr.tasks",
        "cropr.tasks.classification",
        "cropr.tasks.detection",
        "cropr.tasks.segmentation",
        "workflow",
        "workflow.paper",
        "workflow.paper.microbench",
        *(f"workflow.paper.{name}" for name in _GRID_SIDE),
    }
)
"""Modules whose decisions reach a job as text, in its specification and its command line. A digest leaves them out."""

_BODIES = ("body", "handlers", "orelse", "finalbody", "cases")

BY_NAME = {"cropr.pruning.backbones.base": "cropr.pruning.backbones"}
"""Module -> the package whose modules it imports when a host needs them. A digest holds all of them."""

NOTEBOOK_MODULES = tuple(
    f"workflow.paper.{file.stem}"
    for file in sorted((ROOT / "workflow/paper").glob("*.py"))
    if file.stem not in _NO_NOTEBOOK
)
"""Modules that a notebook may use: ``workflow.paper`` imports them when they are asked for."""


@cache
def code_digest(*names: str | None) -> str:
    """Ten hex digits of the code behind a job: comments, docstrings and layout do not count.

    Args:
        names: what the job runs, as ``module``, or as ``module:name`` for a class or function and what it uses of its
            file. What these import counts too, at the top of a file or in a function. What a job finds by name (its
            reducer, its task) must be given as well. None is left out.

    Raises:
        ValueError: no such module.
    """
    digest, modules = hashlib.sha256(), []
    for name in sorted(filter(None, names)):
        module, _, part = name.partition(":")
        if part:
            text, imported = _behind(module, part)
            digest.update(f"{name}\0{text}\0".encode())
            modules += imported
        else:
            modules.append(module)
    for module in sorted(closure(*modules)):
        digest.update(f"{module}\0{_text(module)}\0".encode())
    return digest.hexdigest()[:10]


def shipped(path: str | Path, digest: str) -> bool:
    """Whether the weights file exists and was made by the run of this digest, as its safetensors header says."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
            return bool(json.loads(file.read(size))["__metadata__"]["spec"] == digest)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def closure(*modules: str, without: frozenset[str] = NEUTRAL, by_name: bool = True) -> set[str]:
    """The modules and all that they import of this repository, except ``without`` and what only those import.

    ``by_name`` False leaves out the modules that ``BY_NAME`` adds.

    Raises:
        ValueError: no such module.
    """
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        if (module := waiting.pop()) not in seen and module not in without:
            seen.add(module)
            waiting += imports(module)
            if by_name and module in BY_NAME:
                folder = ROOT.joinpath(*BY_NAME[module].split("."))
                waiting += [f"{BY_NAME[module]}.{file.stem}" for file in folder.glob("*.py") if file.stem != "__init__"]
    return seen


@cache
def imports(module: str) -> tuple[str, ...]:
    """Modules of this repository that a module imports when it runs, not those under ``if TYPE_CHECKING``."""
    return tuple(dict.fromkeys(_imported([_tree(module)])))


def _imported(nodes: Iterable[ast.AST]) -> list[str]:
    """Modules of this repository that some statements import."""
    names: list[str] = []
    for node in (inner for statement in nodes for inner in _statements(statement)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.split(".")[0] in ("cropr", "workflow") and _file(name) is not None]


@cache
def _behind(module: str, name: str) -> tuple[str, list[str]]:
    """The statements of a module that define a name and what it uses there, as text, and the modules they import."""
    statements = {stored: node for node in _tree(module).body for stored in _stored(node)}
    waiting, found = [name], dict[int, ast.stmt]()
    while waiting:
        if (node := statements.get(waiting.pop())) is not None and node.lineno not in found:
            found[node.lineno] = node
            waiting += [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)]
    nodes = [found[line] for line in sorted(found)]
    return " ".join(map(ast.dump, nodes)), _imported(nodes)


def _stored(node: ast.stmt) -> list[str]:
    """Names that a statement defines."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    return [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all statements in it."""
    yield node
    for part in _BODIES:
        for inner in getattr(node, part, ()):
            yield from _statements(inner)


def _silent(node: ast.AST) -> bool:
    """Whether a statement has no effect on a job: a docstring, ``if TYPE_CHECKING``, the entries of ``METHODS``."""
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], "id", None) == "METHODS"
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in (getattr(node.test, "id", None), getattr(node.test, "attr", None))
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@cache
def _tree(module: str) -> ast.Module:
    if (file := _file(module)) is None:
        raise ValueError(f"module {module!r}: no such source file under {ROOT}")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in _statements(tree):
        for part in _BODIES:
            if body := getattr(node, part, None):
                setattr(node, part, [inner for inner in body if not _silent(inner)])
    return tree


@cache
def _text(module: str) -> str:
    return ast.dump(_tree(module))


@cache
def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
