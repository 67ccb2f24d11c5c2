"""What a training run asks of its task: images, model, losses, evaluation. One class a task, one instance a run.

work = open_task(spec, root)             # cropr.tasks
model = work.build()
for images, targets in work.batches(seed=0).epoch(0): ...
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from cropr.data.loading import Share, TrainBatches
from cropr.records import RECORD, read_record
from cropr.specs import ScenesSpec
from cropr.training.specs import TrainSpec


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
    """What a model is worth on a validation set."""

    metrics: dict[str, float]
    """Flat numbers, ``val_images`` among them."""
    series: dict[str, list[Any]] = field(default_factory=dict)
    """What is more than a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """How an evaluation is run; none of it but the seed changes a result on a CPU."""

    batch_size: int = 64
    """Images of a batch of this process, at most."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    """``fp32``, or ``bf16`` or ``fp16`` for autocast."""
    seed: int = 0
    """Of reducers that choose at random."""
    total: Callable[[Tensor], Tensor] = lambda sums: sums
    """Sums over processes; this one is alone unless given."""
    gather: Callable[[list[Any]], list[Any]] = lambda items: items
    """Lists of all processes, joined; of this one alone unless given."""
    predictions: Path | None = None
    """Where detection writes what it found, in COCO's result format; None for nowhere."""


class BatchTask(ABC):
    """What a training step does with a batch. Targets are a tensor [B, ...] unless a task overrides their handling."""

    def move(self, targets: Any, device: torch.device) -> Any:
        """Targets on the device."""
        return targets.to(device, non_blocking=True)

    def prepare(self, images: Tensor, targets: Any) -> tuple[Tensor, Any]:
        """Augment a batch as a whole, on the device; draws from torch's and NumPy's global generators."""
        return images, targets

    def split(self, targets: Any, parts: int) -> Sequence[Any]:
        """Targets of as many micro-batches, as ``Tensor.tensor_split`` splits the images."""
        split: Sequence[Tensor] = targets.tensor_split(parts)
        return split

    def forward(self, model: Any, images: Tensor, targets: Any) -> Any:
        """What the model, in training mode, gives for a (part of a) batch."""
        return model(images)

    @abstractmethod
    def loss(self, output: Any, targets: Any) -> Losses:
        """Losses of what ``forward`` gave."""


class TaskRun(BatchTask):
    """A task with its data, for one specification.

    Args:
        spec: what is trained or evaluated.
        root: the images, in the layout of the task.

    Raises:
        ValueError, FileNotFoundError: images that are not there, or others than the spec asks for.
    """

    headline: ClassVar[dict[str, str]]
    """Metrics, in percent, that sum a run up, the most important first, with the names that readers know them by."""

    def __init__(self, spec: TrainSpec, root: Path) -> None:
        self.spec, self.root = spec, root

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that tell these images from others: their generator's for scenes."""
        scenes = self.spec.data.scenes
        return self.folder_fingerprint() if scenes is None else scenes_fingerprint(self.root, scenes)

    @abstractmethod
    def folder_fingerprint(self) -> str:
        """The same for a folder of the user's."""

    @abstractmethod
    def build(self, pretrained: bool = False) -> Any:
        """The model in training form: has ``token_trace`` and ``deploy()``; names of the parameters that only training
        needs begin with ``reducers.``, those of the encoder with ``backbone.host.``."""

    def load_published(self, model: Any, path: Path) -> bool:
        """Take initial weights from a file with others' names, if it is one that this task knows. False: it is not.

        Raises:
            ValueError: a file that does not fit the model, all differences listed.
        """
        return False

    @abstractmethod
    def batches(self, seed: int, **share: Unpack[Share]) -> TrainBatches:
        """Training batches of this process."""

    @abstractmethod
    def evaluate(self, model: Any, settings: EvaluationSettings, **share: Unpack[Share]) -> Evaluation:
        """Evaluate a model, in training form or deployed; its mode is left as it was."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision for a forward pass; nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def scenes_fingerprint(root: Path, scenes: ScenesSpec) -> str:
    """Fingerprint of generated images.

    Raises:
        ValueError: the spec wants other scenes than lie there.
    """
    record = read_record(root / RECORD)
    mine, theirs = dict(leaves(scenes.model_dump(mode="json"))), dict(leaves(record["spec"]))
    if differing := sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)):
        changes = "; ".join(f"{key} is {theirs.get(key)} there, {mine.get(key)} in the spec" for key in differing)
        raise ValueError(f"{root} holds other scenes than spec.data.scenes asks for: {changes}")
    return str(record["provenance"]["data_fingerprint"])


def names_fingerprint(root: Path, paths: Iterable[str | Path]) -> str:
    """Fingerprint of images by the names of their files below ``root``."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).relative_to(root).as_posix().encode() + b"\n")
    return digest.hexdigest()[:16]


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
