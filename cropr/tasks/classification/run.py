"""Image classification: losses, accuracy, and where the kept tokens lie.

B batch, N patch tokens, K kept, Q queries, M Cropr modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cropr.data.imagenet import EvalImages, TrainImages, load_splits, mixup
from cropr.data.loading import EvalBatches, Share, TrainBatches
from cropr.data.scenes import object_mask, object_patches
from cropr.pruning.model import DeployedViT, Output, PrunedViT
from cropr.pruning.scorer import Aggregator
from cropr.tasks import TrainSpec
from cropr.tasks.base import (
    BatchTask,
    Evaluation,
    EvaluationSettings,
    Losses,
    TaskRun,
    autocast,
    build_model,
    names_fingerprint,
)
from cropr.tasks.classification import DataSpec
from cropr.tasks.per_image import in_order
from cropr.tasks.scoring import Scoring

_ALONE = EvaluationSettings()


class Objective(BatchTask):
    """Soft targets, mixing, losses; the data give mixup, cutmix, label smoothing and the number of classes."""

    def __init__(self, data: DataSpec, aux_weight: float = 1.0) -> None:
        self.data, self.aux_weight, self.mix = data, aux_weight, mixup(data)

    def prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W], mixed in place if the data say so, and soft targets [B, classes]; draws from NumPy."""
        if self.mix is not None:
            return self.mix(images, labels)
        return images, soft_target(labels, self.data.num_classes, self.data.augment.smoothing)

    def loss(self, output: Output, target: Tensor) -> Losses:
        return losses(output, target, self.aux_weight)


class Classification(Objective, TaskRun):
    """Images in class folders, soft targets, mixing."""

    def __init__(self, spec: TrainSpec, root: Path) -> None:
        assert isinstance(spec.data, DataSpec)
        TaskRun.__init__(self, spec, root)
        Objective.__init__(self, spec.data, spec.prune.aux_weight)
        self.splits = load_splits(root, spec.data.num_classes)

    def folder_fingerprint(self) -> str:
        return names_fingerprint(self.splits[0].root, (path for split in self.splits for path in split.paths))

    def build(self, pretrained: bool = False) -> PrunedViT:
        spec, data = self.spec, self.data
        model: PrunedViT = build_model(spec.model, spec.prune, data.num_classes, data.image_size, pretrained)
        for module in model.modules():
            if isinstance(module, Aggregator):
                module.initialise(std=0.02)  # the authors' for classification alone
        return model

    def batches(self, seed: int, **share: Unpack[Share]) -> TrainBatches:
        """Raises ValueError for mixup or cutmix, which mix pairs, with an odd number of images per process."""
        size = self.spec.recipe.batch_size
        batches = TrainBatches(TrainImages(self.splits[0], self.data, seed), size, seed, **share)
        if self.mix is not None and size // batches.world % 2:
            raise ValueError(
                f"mixup and cutmix mix pairs, but a process has {size // batches.world} images of a batch; "
                f"make batch_size ({size}) a multiple of {2 * batches.world}"
            )
        return batches

    def evaluate(
        self, model: PrunedViT | DeployedViT, settings: EvaluationSettings, **share: Unpack[Share]
    ) -> Evaluation:
        split = self.splits[1]
        batches = EvalBatches(EvalImages(split, self.data), settings.batch_size, **share)
        host = (model.model if isinstance(model, DeployedViT) else model).backbone.host
        objects = object_map([split.paths[index] for index in batches.indices], self.data, host.patch_embed.grid_size)
        result = evaluate(model, batches, settings, objects)
        names = np.array([Path(split.paths[index]).relative_to(split.root).as_posix() for index in batches.indices])
        arrays = in_order(settings.gather, batches.indices, {"image": names, **result.images})
        return replace(result, images=arrays)


def losses(output: Output, target: Tensor, aux_weight: float = 1.0) -> Losses:
    """Main loss plus the weighted sum of the auxiliary losses (paper, section 3: all weights 1).

    Args:
        output: of a model in training mode.
        target: [B, classes], probabilities: the label after smoothing, mixup and cutmix. Every auxiliary prediction
            [B, Q, classes] has the same target; the queries of a module share its loss in equal parts.
    """
    main = F.cross_entropy(output.logits.float(), target)
    if not output.aux:
        return Losses(main, main, main.new_empty(0))
    # One kernel for all modules.
    log_probability = torch.stack(output.aux).float().log_softmax(dim=-1)  # [M, B, Q, classes]
    aux = -(log_probability * target[:, None]).sum(dim=-1).mean(dim=(1, 2))
    return Losses(main + aux_weight * aux.sum(), main, aux)


def soft_target(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """[B, classes]: ``smoothing`` spread over all classes, the rest on the label, as timm's mixup does it."""
    spread = smoothing / classes
    target = torch.full((len(labels), classes), spread, device=labels.device)
    return target.scatter_(1, labels[:, None], 1 - smoothing + spread)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    settings: EvaluationSettings = _ALONE,
    objects: Tensor | None = None,
) -> Evaluation:
    """Evaluate a ``PrunedViT`` or a ``DeployedViT``; the mode of the model is left as it was.

    Args:
        batches: images [B, 3, H, W] and labels [B]; with several processes, each has its own part.
        objects: [images, N] bool, which patches lie on the labelled object, in the order of ``batches``.

    Returns:
        Metrics ``top1``, ``top5`` (percent; top5 counts all classes where there are fewer), ``loss``, ``val_images``.
        Series ``relevance``, with objects: per block ``block``, ``kept_on_object`` (share of the kept patches that lie
        on the labelled object, percent), ``object_kept`` (share of the object's patches still alive, percent), both
        means over images; block 0 is the input. Series ``scoring``: see ``cropr.tasks.scoring``. Images of this process
        in their order: ``correct`` [n] bool and, with objects, ``object_kept`` [n, blocks], shares from 0 to 1, NaN
        where there is no object.

    Raises:
        ValueError: there are no images.
    """
    device, training = settings.device, model.training
    model.eval()
    torch.manual_seed(settings.seed)
    forward = model.detailed if isinstance(model, DeployedViT) else model
    sums, shares = torch.zeros(4, dtype=torch.float64, device=device), torch.zeros((), device=device)
    seen, blocks, scoring = 0, [0], Scoring(model)
    correct: list[Tensor] = []
    alive: list[Tensor] = []
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        scoring.on_object = None if objects is None else objects[seen : seen + len(labels)]
        with autocast(device, settings.precision), scoring:
            output: Output = forward(images)
        ranked, counts = _counts(output.logits.float(), labels)
        sums += counts
        correct.append(ranked[:, 0])
        if objects is not None:
            on_object = objects[seen : seen + len(labels)].to(device)
            shares = shares + _shares(output, on_object)
            alive.append(_alive(output, on_object))
            blocks = [0, *output.kept]
        seen += len(labels)
    model.train(training)
    top1, top5, loss, count = settings.total(sums).tolist()
    if not count:
        raise ValueError("no image to evaluate: the validation set is empty")
    found = {name: torch.cat(x).cpu().numpy() for name, x in (("correct", correct), ("object_kept", alive)) if x}
    metrics = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count, "val_images": int(count)}
    if objects is None:
        return Evaluation(metrics, {"relevance": [], **scoring.series(settings.total)}, found)
    relevance = [
        {"block": block, "kept_on_object": 100 * kept / number, "object_kept": 100 * share / max(with_object, 1)}
        for block, (kept, share, with_object, number) in zip(blocks, settings.total(shares).tolist(), strict=True)
    ]
    return Evaluation(metrics, {"relevance": relevance, **scoring.series(settings.total)}, found)


def _counts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 5] bool: which guess is right, best first; [4]: images right at first, right within five, losses, images."""
    ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    sums = torch.stack((ranked[:, 0].sum(), ranked.sum(), loss.double(), loss.new_tensor(len(labels)))).double()
    return ranked, sums


def object_map(paths: Sequence[str], data: DataSpec, grid: tuple[int, int]) -> Tensor | None:
    """[images, h w] bool: which patches lie on the labelled object; None where the truth is not known.

    It is known for sets of scenes that are evaluated as they were drawn, neither resized nor cropped.
    """
    size = (data.image_size, data.image_size)
    if not paths or data.crop_pct != 1 or (first := object_mask(paths[0])) is None or first.shape != size:
        return None
    masks = [object_mask(path) for path in paths]
    return torch.stack([torch.from_numpy(object_patches(mask, grid)) for mask in masks if mask is not None])


def _shares(output: Output, on_object: Tensor) -> Tensor:
    """[blocks, 4]: sums over images, for the input and after every pruning block, see ``evaluate``.

    The columns: share of the kept patches on the object, share of the object's patches kept (0 for an image without
    one), images with an object, images. ``on_object``: [B, N] bool.
    """
    size, rows = on_object.sum(dim=1), []
    for kept in (on_object, *(on_object.gather(1, index) for index in output.kept.values())):
        hit = kept.sum(dim=1).double()
        shares = (hit / kept.shape[1]).sum(), (hit / size.clamp(min=1)).sum()
        rows.append(torch.stack([*shares, (size > 0).sum(), (size >= 0).sum()]))
    return torch.stack(rows)


def _alive(output: Output, on_object: Tensor) -> Tensor:
    """[B, blocks]: share of each image's object patches that are kept, NaN without an object; see ``_shares``."""
    kept = [on_object, *(on_object.gather(1, index) for index in output.kept.values())]
    return torch.stack([patches.sum(dim=1) for patches in kept], dim=1) / on_object.sum(dim=1, keepdim=True)
