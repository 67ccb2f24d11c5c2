"""Classes of single images, for pruning maps (``cropr.show``)."""

from __future__ import annotations

from pathlib import Path

import torch

from cropr.data.imagenet import eval_transform, load_splits
from cropr.data.loading import decode
from cropr.pruning.model import Output
from cropr.show import Answers, Shown, to_pixels
from cropr.tasks import TrainSpec
from cropr.tasks.base import build_model
from cropr.tasks.classification import DataSpec


class ClassAnswers(Answers):
    """A class an image, as text. ``root``: images in the layout of the task; None where only single files are shown.
    Raises ValueError or FileNotFoundError for images that are missing or differ from those of the spec."""

    def __init__(self, spec: TrainSpec, root: Path | None) -> None:
        assert isinstance(spec.data, DataSpec)
        self.data = spec.data
        self.split = load_splits(root, self.data.num_classes)[1] if root else None
        self.labels = self.split.labels if self.split else ()
        self.transform = eval_transform(self.data)
        self.model = build_model(spec.model, spec.prune, self.data.num_classes, self.data.image_size).eval()

    def show(self, item: int | str, device: torch.device) -> Shown:
        split, number = self.split, item if isinstance(item, int) else None
        image = self.transform(decode(str(item) if split is None or number is None else split.paths[number]))
        output: Output = self.model(image[None].to(device))
        scores, best = output.logits[0].float().softmax(dim=-1).sort(descending=True)
        rows = tuple(
            {"class": label, "score": p} for p, label in zip(scores.tolist()[:5], best.tolist()[:5], strict=True)
        )
        names = split.classes if split else self.names
        return Shown(
            image=to_pixels(image, self.data.mean, self.data.std),
            output=output,
            truth_text="" if split is None or number is None else split.classes[split.labels[number]],
            prediction_text=names[rows[0]["class"]] if names else f"class {rows[0]['class']}",
            found=rows,
        )
