"""What a training run needs of its task: images, model, losses, evaluation. A task is a subclass of ``TaskRun``."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import timm
import torch
from torch import Tensor, nn

from cropr.distributed import ALONE, World
from cropr.pruning.backbones.base import adapt
from cropr.pruning.model import Model, PrunedViT, prune
from cropr.pruning.schedule import Schedule
from cropr.records import RECORD, leaves, read_record, replacing
from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks import TrainSpec

if TYPE_CHECKING:
    from cropr.data.loading import TrainBatches


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
    """Arrays with a result for each image, in the order of the validation set; ``image`` has their names or numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """How an evaluation runs; on a CPU only the seed changes a result."""

    world: World = ALONE
    """This process, its device and its peers."""
    workers: int = 0
    """Processes that decode images; 0 decodes in this one."""
    batch_size: int = 64
    """Largest number of images in a batch of this process."""
    precision: str = "fp32"
    """``fp32``, or ``bf16`` or ``fp16`` for autocast."""
    seed: int = 0
    """Of reducers that choose at random."""
    predictions: Path | None = None
    """File for detections in COCO's result format. If None, nothing is written."""


DEFAULT = EvaluationSettings()


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
    """A task with its data, for one specification; ``root`` holds the images in the layout of the task, None where none
    is needed. Raises ValueError or FileNotFoundError for images that are missing or differ from those of the spec."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes in the order of the labels, if the images have any."""
        return ()

    def __init__(self, spec: TrainSpec, root: Path | None) -> None:
        self.spec, self.root, self.data = spec, cast(Path, root), cast(Any, spec.data)
        self.splits: Any = None if root is None else self.load(root)

    @abstractmethod
    def load(self, root: Path) -> tuple[Any, Any]:
        """Training and validation images."""

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

    def teach(self) -> nn.Module:
        """The unpruned model that the task learns from, without its weights. Raises ValueError: no distillation."""
        raise ValueError(f"spec.teacher = {self.spec.teacher}: {self.spec.task} has no distillation; leave it out")

    def load_published(self, model: Any, path: Path) -> bool:
        """Load initial weights from a file of the authors of the model; False if the task knows no such file. Raises
        ValueError for a file that does not fit the model, with all differences."""
        return False

    @abstractmethod
    def batches(self, seed: int, world: World = ALONE, workers: int = 0) -> "TrainBatches":
        """Training batches of this process; ``workers`` processes decode them."""

    @abstractmethod
    def evaluate(self, model: Any, settings: EvaluationSettings = DEFAULT) -> Evaluation:
        """Evaluate a model, in training form or deployed; its mode stays the same."""


def build_model(
    model: ModelSpec,
    spec: PruneSpec,
    num_classes: int,
    image_size: int,
    pretrained: bool = False,
    kind: type[Model] = PrunedViT,  # type: ignore[assignment]
) -> Model:
    """The model of a training or benchmark spec; ``kind`` as of ``prune``. The last block has no drop path where tokens
    are pruned (paper, section 4.1; the authors' code); in dense models, it never has (the authors' code). Raises
    ValueError: timm has no such model or argument, no adapter for it, or an image size that patches do not divide."""
    schedule = Schedule.from_config(spec.schedule)
    try:
        host = _create_host(model, num_classes, image_size, pretrained)
        pruned = prune(host, schedule, spec.reducer, spec.fusion, spec.options, kind=kind)
    except TypeError as error:  # timm: unknown argument; ours: no adapter
        raise ValueError(f"model {model.name}: {error}") from error
    if pruned.reducers or pruned.dense:
        keep_last_block(host)
    return pruned


def _create_host(model: ModelSpec, num_classes: int, image_size: int, pretrained: bool) -> Any:
    arguments = {"num_classes": num_classes, "drop_path_rate": model.drop_path, "img_size": image_size, **model.args}
    try:
        host: Any = timm.create_model(require_known(model.name), pretrained, **arguments)
    except TypeError:
        with torch.device("meta"):
            adapt(timm.create_model(model.name))  # says that its kind cannot be pruned, where that is why
        raise
    if not hasattr(host, "patch_embed"):
        raise ValueError(f"{model.name}: can be pruned in Python alone (docs/hosts.md)")
    if image_size % (side := host.patch_embed.feat_ratio()):
        raise ValueError(f"image_size = {image_size}: must be a multiple of the model's patch size, {side} px")
    return host


def keep_last_block(host: Any) -> None:
    """Take drop path out of the last block."""
    for name, _ in list(host.blocks[-1].named_children()):
        if name.startswith("drop_path"):
            setattr(host.blocks[-1], name, nn.Identity())


def require_known(name: str) -> str:
    """The name of a model, if timm has it. Raises ValueError: it does not; with models of similar names."""
    if not timm.is_model(name):
        known = timm.list_models(["vit_*", "deit*", "eva*"], exclude_filters=["*_r[0-9_]*", "*_re[ls]*"])
        parts = [f"(^|_){word}|{word}(_|$)" for word in re.findall("[a-z0-9]+", name.lower())]
        shared = {one: sum(bool(re.search(part, one)) for part in parts) for one in known}
        alike = {one: (shared[one], SequenceMatcher(None, name.lower(), one).ratio()) for one in known}
        close = [one for one in sorted(known, key=alike.__getitem__)[:-6:-1] if max(alike[one]) > 0.4]
        found = f"timm has no model {name!r}; close to it: {', '.join(close) or 'none'}"
        fix = "those of Hugging Face, torchvision and open_clip are pruned in Python: cropr.prune(model, schedule)"
        raise ValueError(f"{found}. The command line takes timm's models alone; {fix}, see docs/hosts.md")
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


def in_order(
    gather: Callable[[list[Any]], list[Any]], indices: Sequence[int], arrays: Mapping[str, Any]
) -> dict[str, Any]:
    """Arrays of all processes, joined by ``gather``, in the order of the validation set; ``indices`` are the places in
    it of this process's images, of which ``arrays`` have a line each."""
    parts = [part for part in gather([(list(indices), dict(arrays))]) if part[0]]
    order = np.argsort(np.concatenate([np.asarray(places) for places, _ in parts]), kind="stable")
    return {name: np.concatenate([own[name] for _, own in parts])[order] for name in parts[0][1]}


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an npz whole or not at all; equal arrays give equal bytes."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], words: str = "was {}, is {}") -> list[str]:
    """Dotted keys in which two nested mappings differ, each with both values."""
    old, new = dict(leaves(theirs)), dict(leaves(ours))
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return [f"{key} {words.format(old.get(key), new.get(key))}" for key in keys]
