"""The reproduction of the paper: its grid, and what its notebooks import.

    from workflow.paper import load_records, mean_interval, with_interval, save_table

Names are loaded when they are first used, so that the DAG, which needs the grid alone, does not import pandas.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "records": (
        "load_blocks", "load_cells", "load_manifest", "load_maps", "load_pruned_after", "load_published",
        "load_records", "load_rounds", "load_speed", "not_run", "rerun", "setting",
    ),
    "stats": (
        "mcnemar", "mean_interval", "median_bounds", "median_interval", "paired_difference", "seed_bounds",
        "with_interval",
    ),
    "output": ("palette", "save_figure", "save_table", "use_style"),
    "claims": ("verdicts",),
}  # fmt: skip
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
