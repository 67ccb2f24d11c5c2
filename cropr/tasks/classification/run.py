"""Image classification: losses, accuracy, and where the kept tokens lie.

B batch, N patch tokens, K kept, Q queries, M Cropr modules.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

import cropr.tasks.base as base
from cropr.data.imagenet import EvalImages, Split, TrainImages, load_splits, mixup
from cropr.data.loading import EvalBatches, TrainBatches
from cropr.data.scenes import object_mask, object_patches
from cropr.distributed import ALONE, World
from cropr.pruning.model import DeployedViT, Output, PrunedViT
from cropr.pruning.tokens import take
from cropr.specs import PruneSpec
from cropr.tasks import TrainSpec
from cropr.tasks.base import DEFAULT, BatchTask, Evaluation, EvaluationSettings, Losses, TaskRun, autocast, build_model
from cropr.tasks.classification import DataSpec
from cropr.tasks.scoring import Scoring


class Objective(BatchTask):
    """Soft targets, mixing, losses; the data give mixup, cutmix, label smoothing and the number of classes."""

    def __init__(self, data: DataSpec, aux_weight: float = 1.0) -> None:
        self.data, self.aux_weight, self.mix = data, aux_weight, mixup(data)
        self.teacher: PrunedViT | None = None

    def prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W], mixed in place if the data say so, and soft targets [B, classes]; draws from NumPy."""
        if self.mix is not None:
            return self.mix(images, labels)
        return images, soft_target(labels, self.data.num_classes, self.data.augment.smoothing)

    def forward(self, model: Any, images: Tensor, targets: Any) -> Output:
        output: Output = model(images)
        if self.teacher is None:
            return output
        with torch.no_grad():
            teacher = self.teacher(images)
        return replace(output, losses={**output.losses, **distillation(output, teacher)})

    def loss(self, output: Output, target: Tensor) -> Losses:
        return losses(output, target, self.aux_weight)


class Classification(Objective, TaskRun):
    """Images in class folders, soft targets, mixing."""

    def __init__(self, spec: TrainSpec, root: Path | None) -> None:
        TaskRun.__init__(self, spec, root)
        Objective.__init__(self, self.data, spec.prune.aux_weight)

    def load(self, root: Path) -> tuple[Split, Split]:
        return load_splits(root, self.data.num_classes)

    @property
    def classes(self) -> Sequence[str]:
        return list(self.splits[0].classes)

    def folder_fingerprint(self) -> str:
        return base.names_fingerprint(self.splits[0].root, (path for split in self.splits for path in split.paths))

    def build(self, pretrained: bool = False) -> PrunedViT:
        spec, data = self.spec, self.data
        model: PrunedViT = build_model(spec.model, spec.prune, data.num_classes, data.image_size, pretrained)
        for reducer in cast(Iterable[Any], model.reducers.values()):
            if hasattr(reducer, "aggregator"):
                reducer.aggregator.initialise(std=0.02)  # the authors' for classification alone
        return model

    def teach(self) -> nn.Module:
        spec, data = self.spec, self.data
        self.teacher = build_model(spec.model, PruneSpec(), data.num_classes, data.image_size)
        return self.teacher.requires_grad_(False).eval()

    def batches(self, seed: int, world: World = ALONE, workers: int = 0) -> TrainBatches:
        """Raises ValueError for mixup or cutmix, which mix pairs, with an odd number of images per process."""
        size = self.spec.recipe.batch_size
        batches = TrainBatches(TrainImages(self.splits[0], self.data, seed), size, seed, world=world, workers=workers)
        if self.mix is not None and size // world.size % 2:
            odd = f"mixup and cutmix mix pairs, but a process has {size // world.size} images of a batch"
            raise ValueError(f"{odd}; make batch_size ({size}) a multiple of {2 * world.size}")
        return batches

    def evaluate(self, model: PrunedViT | DeployedViT, settings: EvaluationSettings = DEFAULT) -> Evaluation:
        split, world = self.splits[1], settings.world
        images = EvalImages(split, self.data)
        batches = EvalBatches(images, settings.batch_size, world=world, workers=settings.workers)
        host = (model.model if isinstance(model, DeployedViT) else model).backbone.host
        objects = object_map([split.paths[index] for index in batches.indices], self.data, host.patch_embed.grid_size)
        result = evaluate(model, batches, settings, objects)
        names = np.array([Path(split.paths[index]).relative_to(split.root).as_posix() for index in batches.indices])
        arrays = base.in_order(world.gather, batches.indices, {"image": names, **result.images})
        return replace(result, images=arrays)


def losses(output: Output, target: Tensor, aux_weight: float = 1.0) -> Losses:
    """Main loss plus the weighted sum of the auxiliary losses (paper, section 3: all weights 1), plus other losses of
    the reducers. ``target`` [B, classes] are probabilities, also of every auxiliary prediction [B, Q, classes]; the
    queries of a module share its loss in equal parts."""
    main = F.cross_entropy(output.logits.float(), target)
    if not output.aux:
        return Losses(main + output.extra_loss, main, main.new_empty(0))
    # One kernel for all modules.
    log_probability = torch.stack(output.aux).float().log_softmax(dim=-1)  # [M, B, Q, classes]
    aux = -(log_probability * target[:, None]).sum(dim=-1).mean(dim=(1, 2))
    return Losses(main + aux_weight * aux.sum() + output.extra_loss, main, aux)


def distillation(output: Output, teacher: Output) -> dict[str, Tensor]:
    """Losses against the unpruned ``teacher`` (Rao et al., 2021): half the Kullback-Leibler divergence of predictions
    and, where tokens are whole patches, half the mean squared difference of kept tokens after the last norm."""
    student, expected = (each.logits.float().log_softmax(dim=1) for each in (output, teacher))
    found = {"teacher": 0.5 * F.kl_div(student, expected, reduction="batchmean", log_target=True)}
    tokens = output.tokens
    if tokens.index is None or tokens.source is not None:
        return found
    far = (tokens.patches.float() - take(teacher.tokens.patches, tokens.index).float()).square().mean(dim=2)
    weight = torch.ones_like(far) if tokens.weight is None else tokens.weight.detach()
    return found | {"teacher_tokens": 0.5 * (weight * far).sum() / weight.sum().clamp(min=1)}


def soft_target(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """[B, classes]: ``smoothing`` spread over all classes, the rest on the label, as timm's mixup does it."""
    spread = smoothing / classes
    target = torch.full((len(labels), classes), spread, device=labels.device)
    return target.scatter_(1, labels[:, None], 1 - smoothing + spread)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    settings: EvaluationSettings = DEFAULT,
    objects: Tensor | None = None,
) -> Evaluation:
    """Evaluate a ``PrunedViT`` or a ``DeployedViT``; the mode of the model is left as it was.

    ``batches`` are images [B, 3, H, W] and labels [B]; with several processes, each has its own part. ``objects``
    [images, N] bool are the patches on the labelled object, in the same order. Raises ValueError: there are no images.

    Returns metrics ``top1``, ``top5`` (percent; top5 counts all classes where there are fewer), ``loss``,
    ``val_images``. Series ``relevance``, with objects: ``block`` (0 is the input), ``kept_on_object`` (share of the
    kept patches that lie on the object, percent), ``object_kept`` (share of the object's patches still alive, percent),
    means over images; ``scoring``: see ``cropr.tasks.scoring``. Images of this process: ``correct`` [n] bool;
    ``pruned_after`` [n, N] int8, see ``Output``, but for slots; with objects, ``object_kept`` [n, blocks], from 0 to 1.
    """
    device, training = settings.world.device, model.training
    model.eval()
    torch.manual_seed(settings.seed)
    forward = model.detailed if isinstance(model, DeployedViT) else model
    seen, blocks, scoring = 0, [0], Scoring(model)
    results, shares, after = list[Tensor](), list[Tensor](), list[Tensor]()
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        scoring.on_object = None if objects is None else objects[seen : seen + len(labels)].to(device)
        scoring.labels = labels
        with autocast(device, settings.precision), scoring:
            output: Output = forward(images)
        results.append(_results(output.logits.float(), labels))
        placed = output.tokens.index is not None  # slots have no place
        if placed:
            after.append(output.pruned_after(output.grid[0] * output.grid[1]).to(torch.int8))
        if placed and scoring.on_object is not None:
            shares.append(_shares(output, scoring.on_object))
            blocks = [0, *output.kept]
        seen += len(labels)
    model.train(training)
    own = torch.cat([torch.zeros(3, 0, dtype=torch.float64, device=device), *results], dim=1)
    count, *sums = settings.world.sum(torch.stack((own.new_tensor(seen), *own.sum(dim=1)))).tolist()
    if not count:
        raise ValueError("no image to evaluate: the validation set is empty")
    top1, top5, loss = (value / count for value in sums)
    metrics = {"top1": 100 * top1, "top5": 100 * top5, "loss": loss, "val_images": int(count)}
    found, relevance = {"correct": own[0].bool().cpu().numpy()}, list[dict[str, float]]()
    if after:
        found["pruned_after"] = torch.cat(after).cpu().numpy()
    if shares:
        each = torch.cat(shares, dim=1)  # [2, images, blocks]
        found["object_kept"] = each[1].float().cpu().numpy()
        totals = settings.world.sum(torch.stack((each.nansum(dim=1), (~each.isnan()).sum(dim=1).double())))
        means = 100 * totals[0] / totals[1].clamp(min=1)
        rows = zip(blocks, *means.tolist(), strict=True)
        relevance = [{"block": block, "kept_on_object": kept, "object_kept": share} for block, kept, share in rows]
    return Evaluation(metrics, {"relevance": relevance, **scoring.series(settings.world.sum)}, found)


def _results(logits: Tensor, labels: Tensor) -> Tensor:
    """[3, B] float64 of each image: whether the first guess is right, or one of the first five, and the loss."""
    ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none")
    return torch.stack((ranked[:, 0].double(), ranked.any(dim=1).double(), loss.double()))


def object_map(paths: Sequence[str], data: DataSpec, grid: tuple[int, int]) -> Tensor | None:
    """[images, h w] bool: which patches lie on the labelled object; None where the truth is not known: it is of scenes
    and public sets. Masks are resized and cropped as the images are."""
    if not paths or object_mask(paths[0]) is None:
        return None
    shorter, size = int(data.image_size / data.crop_pct), [data.image_size] * 2

    def patches(path: str) -> Tensor:
        mask = torch.tensor(object_mask(path))[None]
        if list(mask.shape[1:]) != size:
            mask = center_crop(resize(mask, [shorter], InterpolationMode.NEAREST), size)
        return torch.from_numpy(object_patches(mask[0].numpy(), grid))

    return torch.stack([patches(path) for path in paths])


def _shares(output: Output, on_object: Tensor) -> Tensor:
    """[2, B, blocks]: of each image, at the input and after every pruning block, the share of the kept patches that lie
    on the object, and that of the object's patches that are kept, NaN without an object. ``on_object``: [B, N] bool."""
    kept = [torch.zeros_like(on_object).scatter(1, index, True) for index in output.kept.values()]
    alive = torch.stack([torch.ones_like(on_object), *kept], dim=2)  # a patch counts once, where padding repeats it
    hit = (alive & on_object.unsqueeze(2)).sum(dim=1).double()
    return torch.stack((hit / alive.sum(dim=1), hit / hit[:, :1]))
