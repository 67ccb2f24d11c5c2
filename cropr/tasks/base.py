"""What a training run needs of its task: images, model, losses, evaluation. A task is a subclass of ``TaskRun``."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import timm
import torch
from torch import Tensor, nn

from cropr.pruning.model import Model, PrunedViT, prune
from cropr.pruning.schedule import Schedule
from cropr.records import RECORD, read_record

if TYPE_CHECKING:
    from cropr.data.loading import Share, TrainBatches
    from cropr.specs import ModelSpec, PruneSpec
    from cropr.tasks import TrainSpec


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of a batch, averaged over its images."""

    total: Tensor
    """Scalar, to be differentiated."""
    main: Tensor
    """Scalar."""
    aux: Tensor
    """[M], one a Cropr module, unweighted; empty without auxiliary predictions."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result on a validation set: scalars, with ``val_images``, and lists by class or by block."""

    metrics: dict[str, float]
    series: dict[str, list[Any]] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    """Arrays with a result for each image (``cropr.tasks.per_image``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """How an evaluation runs; on a CPU only the seed changes a result."""

    batch_size: int = 64
    """Largest number of images in a batch of this process."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    """``fp32``, or ``bf16`` or ``fp16`` for autocast."""
    seed: int = 0
    """Of reducers that choose at random."""
    total: Callable[[Tensor], Tensor] = lambda sums: sums
    """Adds tensors over processes; by default there is one process."""
    gather: Callable[[list[Any]], list[Any]] = lambda items: items
    """Joins the lists of all processes; by default there is one process."""
    predictions: Path | None = None
    """File for detections in COCO's result format. If None, nothing is written."""


class BatchTask(ABC):
    """What a training step does with a batch. Targets are a tensor [B, ...] unless a task overrides the methods."""

    def move(self, targets: Any, device: torch.device) -> Any:
        """Targets on the device."""
        return targets.to(device, non_blocking=True)

    def prepare(self, images: Tensor, targets: Any) -> tuple[Tensor, Any]:
        """Augment a batch on the device; draws from torch's and NumPy's global generators."""
        return images, targets

    def split(self, targets: Any, parts: int) -> Sequence[Any]:
        """Targets of ``parts`` micro-batches, as ``Tensor.tensor_split`` splits the images."""
        return cast(Sequence[Tensor], targets.tensor_split(parts))

    def forward(self, model: Any, images: Tensor, targets: Any) -> Any:
        """Output of the model, in training mode, for a batch or a part of one."""
        return model(images)

    @abstractmethod
    def loss(self, output: Any, targets: Any) -> Losses:
        """Losses of an output of ``forward``."""


class TaskRun(BatchTask):
    """A task with its data, for one specification; ``root`` holds the images in the layout of the task. Raises
    ValueError or FileNotFoundError for images that are missing or differ from those of the spec."""

    def __init__(self, spec: TrainSpec, root: Path) -> None:
        self.spec, self.root, self.data = spec, root, cast(Any, spec.data)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that identify the images: those of the record for scenes. Raises ValueError for scenes in
        ``root`` that differ from those of the spec."""
        if (scenes := self.spec.data.scenes) is None:
            return self.folder_fingerprint()
        record = read_record(self.root / RECORD)
        if changes := differences(record["spec"], scenes.model_dump(mode="json"), "is {} there, {} in the spec"):
            raise ValueError(f"{self.root} holds other scenes than spec.data.scenes asks for: {'; '.join(changes)}")
        return str(record["provenance"]["data_fingerprint"])

    @abstractmethod
    def folder_fingerprint(self) -> str:
        """The same for a folder of the user."""

    @abstractmethod
    def build(self, pretrained: bool = False) -> Any:
        """The model in training form, with ``token_trace`` and ``deploy()``. Names of parameters that only training
        needs begin with ``reducers.``, those of the encoder with ``backbone.host.``."""

    def load_published(self, model: Any, path: Path) -> bool:
        """Load initial weights from a file of the authors of the model; False if the task knows no such file. Raises
        ValueError for a file that does not fit the model, with all differences."""
        return False

    @abstractmethod
    def batches(self, seed: int, **share: Unpack[Share]) -> TrainBatches:
        """Training batches of this process."""

    @abstractmethod
    def evaluate(self, model: Any, settings: EvaluationSettings, **share: Unpack[Share]) -> Evaluation:
        """Evaluate a model, in training form or deployed; its mode stays the same."""


def build_model(
    model: ModelSpec,
    spec: PruneSpec,
    num_classes: int,
    image_size: int,
    pretrained: bool = False,
    kind: type[Model] = PrunedViT,  # type: ignore[assignment]
) -> Model:
    """The model of a training or benchmark spec; ``kind`` as of ``prune``.

    The last block has no drop path where tokens are pruned (paper, section 4.1; the authors' code); in dense models,
    it never has (the authors' code).
    """
    host: Any = timm.create_model(
        model.name,
        pretrained=pretrained,
        num_classes=num_classes,
        drop_path_rate=model.drop_path,
        **{"img_size": image_size, **model.args},
    )
    side = getattr(getattr(host, "patch_embed", None), "patch_size", (1, 1))[0]
    if image_size % side:
        raise ValueError(f"image_size = {image_size}: must be a multiple of the model's patch size, {side} px")
    schedule = Schedule.from_config(spec.schedule)
    pruned = prune(host, schedule, spec.reducer, spec.fusion, spec.options, kind=kind)
    if pruned.reducers or pruned.dense:
        for name, _ in list(host.blocks[-1].named_children()):
            if name.startswith("drop_path"):
                setattr(host.blocks[-1], name, nn.Identity())
    return pruned


def require_known(name: str) -> str:
    """The name of a model, if timm has it.

    Raises:
        ValueError: it does not; with models of similar names.
    """
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0].split('_patch')[0]}*")[:8]
        raise ValueError(f"timm has no model {name!r}; close to it: {', '.join(close) or 'none'}")
    return name


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision of a forward pass; no effect for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def names_fingerprint(root: Path, paths: Iterable[str | Path]) -> str:
    """Fingerprint of images by the names of their files below ``root``."""
    names = "".join(f"{Path(path).relative_to(root).as_posix()}\n" for path in paths)
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], words: str = "was {}, is {}") -> list[str]:
    """Dotted keys in which two nested mappings differ, each with both values."""
    old, new = _leaves(theirs), _leaves(ours)
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return [f"{key} {words.format(old.get(key), new.get(key))}" for key in keys]


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted keys and values of nested mappings."""
    if not isinstance(value, Mapping) or not value:
        return {key: value}
    parts = (_leaves(item, f"{key}.{name}".lstrip(".")) for name, item in value.items())
    return {name: leaf for part in parts for name, leaf in part.items()}
