"""The first ten losses of a tiny run: any change of arithmetic, order or augmentation shows in them.

PYTHONPATH=.:tests/cropr python tests/cropr/golden_losses.py      writes assets/losses/tiny_cropr.json again
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import tiny

from cropr.data.imagenet import load_splits
from cropr.tasks.classification.run import Objective
from cropr.training.loop import Settings, fit

GOLDEN = Path(__file__).parent / "assets" / "losses" / "tiny_cropr.json"
STEPS = 10


def run(directory: Path) -> dict[str, list[float]]:
    """Train in ``directory``, fp32 on the CPU; ``loss`` and ``aux_loss`` of the first steps."""
    spec = tiny.spec(data__augment={"hflip": 0.5, "mixup": 0.8, "smoothing": 0.1})
    images, _ = load_splits(tiny.write_folder(directory / "images"))
    fit(
        tiny.model(spec),
        Objective(spec.data),
        tiny.batches(images, spec),
        spec.recipe,
        0,
        Settings(out=directory / "run"),
    )
    lines = tiny.log_lines(directory / "run")[:STEPS]
    return {key: [round(line[key], 6) for line in lines] for key in ("loss", "aux_loss")}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.parent.mkdir(parents=True, exist_ok=True)
        GOLDEN.write_text(json.dumps(run(Path(scratch)), indent=1) + "\n")
