"""Weights and training state on disk: safetensors for tensors, JSON for the rest. Nothing is unpickled.

A run keeps one checkpoint, ``<out>/checkpoint/step_<n>/``: ``model.safetensors``, ``optimizer.safetensors``,
``state.json``, and ``average.safetensors`` where the recipe averages weights. A directory of this name is complete.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.optim import Optimizer

from cropr.data.loading import some
from cropr.pruning.model import DeployedViT
from cropr.records import RECORD, read_record, replacing, write_text
from cropr.tasks.base import TaskRun
from cropr.training.optim import HOST

WEIGHTS = "weights.safetensors"
"""A finished run's weights, training form, in the run's directory."""
BEST = "best.safetensors"
"""The weights whose first metric was the highest, where a run was evaluated while it trained."""
CHECKSUM = "sha256"
"""Key of a file's header with the digest of its tensors, by which a damaged file is refused."""
AVERAGE = "average.safetensors"
FINAL_NORMS = ("norm", "fc_norm")
"""timm's two places for the last norm: with average pooling ``fc_norm``, else ``norm``. A host whose pooling differs
from the pretrained one has a fresh norm there, as in the authors' code."""

_LOG = logging.getLogger(__name__)


def save_checkpoint(
    root: Path, step: int, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], average: Any = None
) -> Path:
    """Write ``root/step_<step>`` whole or not at all, then drop older checkpoints. Returns the new directory. ``step``
    counts the optimizer steps done; ``state`` is JSON, whatever else the loop needs to go on; ``average`` is a model
    with the averaged weights. The groups of the optimizer carry ``names`` (``create_optimizer``)."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".tmp_*"):
        shutil.rmtree(leftover)
    final, temporary = root / f"step_{step:08d}", root / f".tmp_{step:08d}"
    if final.exists():
        return final
    temporary.mkdir()
    save_weights(temporary / "model.safetensors", model)
    if average is not None:
        save_weights(temporary / AVERAGE, average)
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in _trained(optimizer).items()}
    tensors = {f"{name}/{part}": tensor for name, own in states.items() for part, tensor in own.items()}
    _save_tensors(temporary / "optimizer.safetensors", tensors)
    write_text(temporary / "state.json", json.dumps({**state, "step": step}, sort_keys=True))
    temporary.rename(final)
    for older in root.glob("step_*"):
        if older != final:
            shutil.rmtree(older)
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint with the most steps in ``root``; None if there is none."""
    return max(root.glob("step_*"), default=None)


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: Optimizer, average: nn.Module | None = None
) -> dict[str, Any]:
    """Put all that ``save_checkpoint`` has written back; returns the JSON part. Raises ValueError: it belongs to
    another model: missing, unexpected and mis-shaped keys are listed."""
    load_weights(model, checkpoint / "model.safetensors")
    if average is not None:
        load_weights(average, checkpoint / AVERAGE)
    path, parameters = checkpoint / "optimizer.safetensors", _trained(optimizer)
    optimizer.state.clear()
    for key, tensor in _read(path).items():
        name, _, part = key.rpartition("/")
        if name not in parameters:
            raise ValueError(f"{path}: state of {name}, which the model does not train; this is another model's")
        optimizer.state[parameters[name]][part] = tensor.to(parameters[name].device)
    return dict(json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def _trained(optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Parameters of an optimizer by name."""
    return {n: p for group in optimizer.param_groups for n, p in zip(group["names"], group["params"], strict=True)}


def save_weights(path: Path, model: nn.Module, spec: str | None = None) -> None:
    """Write all parameters and persistent buffers, whole or not at all. ``spec``, the digest of the run that made them,
    goes into the file's header, where the workflow looks for it before it takes weights that the repository ships."""
    _save_tensors(path, model.state_dict(), {"spec": spec} if spec else None)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load exactly the parameters and buffers that the model has. Raises FileNotFoundError: no such file; ValueError:
    missing, unexpected or mis-shaped keys, all listed; or not a safetensors file."""
    tensors = _read(path)
    _require_match(path, tensors, model.state_dict())
    model.load_state_dict(tensors)


def initial_model(task: TaskRun, init: Path | None, resuming: bool) -> tuple[Any, str | None]:
    """The model with the weights to start from (a run that is resumed needs none), and the digest of their file. Raises
    ValueError, FileNotFoundError: weights, or a model of timm, that do not fit the specification."""
    spec = task.spec
    known = spec.init in ("random", "timm")
    if known and init is not None:
        raise ValueError(f"spec.init = {spec.init}: takes no weights, but {init} was given; leave one of them out")
    pretrained = spec.init == "timm" and not resuming
    try:
        model = task.build(pretrained)
    except (RuntimeError, OSError, TypeError) as error:
        # timm: unknown model or argument, weights that do not exist or cannot be fetched; ours: no adapter.
        fix = "; without a network, give a file with --init" if pretrained else ""
        raise ValueError(f"spec.model.name = {spec.model.name}: {error}{fix}") from error
    path = init / WEIGHTS if init and init.is_dir() else init
    if path is None:
        if known or resuming:
            return model, None
        raise ValueError(f"spec.init = {spec.init}: name that run's weights with --init (file or directory of the run)")
    if not resuming:
        _require_run(path, "init", spec.init)
        if not task.load_published(model, path):
            load_initial(model, path)
    with path.open("rb") as file:
        return model, hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load_teacher(task: TaskRun, path: Path | None, device: torch.device) -> None:
    """Give a task whose specification names a teacher that network, on the device: the weights of a file or of the
    directory of a run. Raises ValueError or FileNotFoundError for weights that do not fit the specification."""
    name = task.spec.teacher
    if (name is None) != (path is None):
        raise ValueError(f"spec.teacher = {name}: name that run's weights with --teacher, or leave both out")
    if name is not None and path is not None:
        path = path / WEIGHTS if path.is_dir() else path
        _require_run(path, "teacher", name)
        model = task.teach()
        load_weights(model, path)
        model.to(device)


def _require_run(path: Path, key: str, name: str) -> None:
    """Refuse weights that lie beside the record of another run."""
    if (path.parent / RECORD).exists() and (found := read_record(path.parent).get("id")) != name:
        raise ValueError(f"{path} was made by run {found}, spec.{key} asks for {name}")


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters in training form, and how many of them only training needs."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    parts = [name.split(".") for name in sizes if name.startswith("reducers.")]
    unneeded = [p for p in parts if p[2] in model.get_submodule(".".join(p[:2])).training_only]  # type: ignore[operator]
    extra = sum(sizes[".".join(part)] for part in unneeded)
    return {"parameters": sum(sizes.values()), "parameters_training_only": extra}


def multiply_adds(model: nn.Module) -> dict[str, float]:
    """``gmacs`` of the deployed model for one image, in 10^9; nothing for a detector, whose heads vary by image."""
    # Found by name: what training computes does not depend on how multiply-adds are counted.
    macs = import_module("cropr.pruning.flops").macs
    deployed = model.deploy()  # type: ignore[operator]
    return {"gmacs": macs(deployed).total / 1e9} if isinstance(deployed, DeployedViT) else {}


def load_initial(model: nn.Module, path: Path) -> dict[str, list[str]]:
    """Start from the host weights of another run, or from a file with the names of a timm model. Reducers start fresh;
    so do other parts beside the host, unless the model's class lists them in ``inherits`` and the file has them.
    Positions are interpolated to the patch grid; the classifier starts fresh if the number of classes differs. A class
    token or a classifier that the model lacks is ignored. ``FINAL_NORMS`` may be missing from either. All else must
    match; raises what ``load_weights`` raises. Returns names: ``loaded``, ``interpolated``, ``fresh``, ``ignored``."""
    tensors = _read(path)
    if wrong := [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]:
        raise ValueError(f"{path}: values are not finite in {some(wrong, ', ', limit=3)}; start from other weights")
    if any(name.startswith(HOST) for name in tensors):
        _inherit(model, path, tensors)
        tensors = {name.removeprefix(HOST): tensor for name, tensor in tensors.items() if name.startswith(HOST)}
    host = model.get_submodule(HOST.rstrip("."))
    own = host.state_dict()
    if "cls_token" in tensors and "cls_token" not in own:
        del tensors["cls_token"]
        if "pos_embed" in tensors:
            tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    resampled = _resample_positions(host, own, tensors)
    apart = {name for name in own.keys() ^ tensors.keys() if name.split(".")[0] in FINAL_NORMS}
    heads = {name for name in {*own, *tensors} if name.startswith(("head.", "head_dist."))}
    if any(name not in own or tensors[name].shape != own[name].shape for name in heads & set(tensors)):
        apart |= heads
    found, wanted = ({name: tensor for name, tensor in all_.items() if name not in apart} for all_ in (tensors, own))
    _require_match(path, found, wanted)
    host.load_state_dict({**own, **found})
    _LOG.info("%s: %d host tensors loaded; reducers start fresh", path, len(found))
    fresh, ignored = [name for name in own if name in apart], [name for name in tensors if name in apart - own.keys()]
    notes = {"interpolated to this patch grid": resampled, "start fresh, since the file has none that fit": fresh}
    for text, names in {**notes, "in the file only": ignored}.items():
        if names:
            _LOG.info("  %s: %s", text, some(names, ", "))
    return {"loaded": list(found), "interpolated": resampled, "fresh": fresh, "ignored": ignored}


def _inherit(model: nn.Module, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Load the parts beside the host that go from one run to the next, such as a detector's heads."""
    parts = tuple(f"{part}." for part in getattr(model, "inherits", ()))
    if found := {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}:
        _require_match(path, found, {k: v for k, v in model.state_dict().items() if k.startswith(parts)})
        model.load_state_dict(found, strict=False)


def _resample_positions(host: nn.Module, own: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Fit absolute positions to the host's patch grid, in place; names of those that changed."""
    name = "pos_embed"
    if name not in own or name not in tensors or own[name].shape == tensors[name].shape:
        return []
    prefix = 0 if getattr(host, "no_embed_class", False) else int(host.num_prefix_tokens)  # type: ignore[arg-type]
    patches = tensors[name].shape[1] - prefix
    if tensors[name].shape[-1] != own[name].shape[-1] or patches < 1 or math.isqrt(patches) ** 2 != patches:
        return []  # another width or no square grid: reported as mis-shaped
    grid = host.patch_embed.grid_size  # type: ignore[union-attr]
    tensors[name] = resample_abs_pos_embed(tensors[name], new_size=list(grid), num_prefix_tokens=prefix)  # type: ignore[arg-type]
    return [name]


def _require_match(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    shapes = {name: (list(found[name].shape), list(tensor.shape)) for name, tensor in wanted.items() if name in found}
    differing = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "other shape": [f"{name} {own}, in the model {model}" for name, (own, model) in shapes.items() if own != model],
    }
    problems = [f"{what} {len(names)}: {some(names, ', ')}" for what, names in differing.items() if names]
    if problems:
        raise ValueError(f"{path} does not fit the model; " + "; ".join(problems))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; weights are expected as safetensors")
    try:
        with safe_open(path, "pt") as file:
            wanted = (file.metadata() or {}).get(CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if wanted not in (None, _checksum(tensors)):
        raise ValueError(f"{path}: differs from the checksum in its header: it is damaged; delete it or copy it again")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, {**(metadata or {}), CHECKSUM: _checksum(plain)})
            _order_metadata(temporary)
        except SafetensorError as error:  # also of a full disk
            raise OSError(f"{path} cannot be written: {error}") from None


def _order_metadata(path: Path) -> None:
    """Sort what the header says beside the tensors: safetensors writes it in random order, but the digest of a file
    names initial weights, so that equal weights must be equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))
