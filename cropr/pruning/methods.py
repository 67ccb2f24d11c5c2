"""Every reducer and fusion by name, without torch: what specs, command line, labels, figures and digests know of them.

The entry of a method stands in the file of its class, in a literal named ``METHODS``. Its entry ``*`` holds for all
methods of the file; ``like`` names an entry that it repeats but for what it says itself. The literal is read from the
source text, as setuptools reads a version, because importing the file would import torch. To add a reducer, add a file
to ``reducers/`` with its class and its entry.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

Place = Literal["after_attention", "after_block", "before_last_block", "after_last_block", "after_head"]
"""Where a reducer acts (the first two) or a fusion brings pruned tokens back."""
Family = Literal["pruner", "merger", "slots", "adaptive"]
"""Pruners choose whole tokens; mergers average tokens; slots mix all tokens; adaptive methods have a count by image, or
in training a mask."""

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What is known about a reducer or a fusion without importing its class."""

    name: str
    """As in specs, configuration and command line."""
    path: str | None
    """``module:Class``; None where nothing is done."""
    label: str
    """For readers: tables and legends; the name of the class unless given."""
    options: tuple[str, ...] = ()
    """Keyword arguments that a spec may set."""
    training_only: tuple[str, ...] = ()
    """Options that deployment folds into one vector or drops: they do not change the speed of a deployed model."""
    colour: str = "#5f5f5f"
    """In every figure, as hexadecimal RGB."""
    marker: str = "X"
    """In every figure, as matplotlib names it."""
    place: Place | None = None
    """Of a fusion, or where a reducer acts unless told otherwise; None for ``none``."""
    family: Family = "pruner"
    """Of a reducer."""
    trained: bool = False
    """Has weights of its own: needs training before it is of use."""

    @property
    def module(self) -> str | None:
        """Dotted name of the file that holds the class."""
        return self.path.partition(":")[0] if self.path else None

    def load(self) -> Any:
        """The class. Imports torch."""
        assert self.path is not None, f"{self.name} has no class"
        module, _, name = self.path.partition(":")
        return getattr(import_module(module), name)


def declared(file: Path, table: str) -> Iterator[tuple[str, str, Any]]:
    """Module, key and value of each entry of the literal ``table`` of a source file in this package."""
    module = ".".join(["cropr", "pruning", *file.relative_to(_HERE).with_suffix("").parts])
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == table:
            yield from ((module, key, value) for key, value in ast.literal_eval(node.value).items())


def _table(files: list[Path]) -> dict[str, Method]:
    found: dict[str, Method] = {}
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    for module, name, entry in (one for file in files for one in declared(file, "METHODS")):
        facts[module, name] = known = facts.get((module, entry.pop("like", "*")), {}) | entry
        if name != "*":
            kind, others = known["class"], {key: value for key, value in known.items() if key != "class"}
            found[name] = Method(name=name, path=f"{module}:{kind}" if kind else None, **{"label": kind, **others})
    return found


REDUCERS: dict[str, Method] = {
    "none": Method(name="none", path=None, label="No pruning", colour="#3b3b3b", marker="s"),
    **_table(sorted((_HERE / "reducers").glob("*.py"))),
}
"""Reducers by name; ``none`` is the unpruned model."""

FUSIONS: dict[str, Method] = _table([_HERE / "fusion.py"])
"""Fusions by name; ``none`` prunes for good."""


def choose(table: dict[str, Method], kind: str, name: str) -> Method:
    """The entry of a name in ``REDUCERS`` or ``FUSIONS``. Raises ValueError for an unknown name of this ``kind``."""
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(table)}")
    return table[name]


def before_last_block(fusion: str) -> bool:
    """Whether a fusion brings pruned tokens back before the last block, which then computes on all tokens."""
    return FUSIONS[fusion].place == "before_last_block"
