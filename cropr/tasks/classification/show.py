"""Classes of single images, for pruning maps (``cropr.show``)."""

from collections.abc import Sequence

import torch

from cropr.data.imagenet import eval_transform
from cropr.data.loading import decode
from cropr.pruning.model import Output
from cropr.show import Answers, Shown, to_pixels


class ClassAnswers(Answers):
    """A class an image, as text."""

    def labels(self) -> Sequence[int]:
        return self.split.labels

    def show(self, item: int | str, device: torch.device) -> Shown:
        split, number = self.split, item if isinstance(item, int) else None
        image = eval_transform(self.data)(decode(str(item) if split is None or number is None else split.paths[number]))
        output: Output = self.model(image[None].to(device))
        scores, best = output.logits[0].float().softmax(dim=-1).sort(descending=True)
        pairs = zip(best.tolist()[:5], scores.tolist()[:5], strict=True)
        rows = tuple({"class": label, "score": score} for label, score in pairs)
        names = split.classes if split else self.names
        return Shown(
            image=to_pixels(image, self.data.mean, self.data.std),
            output=output,
            truth_text="" if split is None or number is None else split.classes[split.labels[number]],
            prediction_text=names[rows[0]["class"]] if names else f"class {rows[0]['class']}",
            found=rows,
        )
