"""Time of a forward pass by part, from torch's profiler.

Modules are labelled while the profiler runs, so that the model is timed as it is. Time is that of each
operation without those that it calls, given to the innermost label around it: the parts add up to the whole.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent

from cropr.bench.device import noise, quiet_profile, run_forced, weights_dtype, with_attention_kernel
from cropr.bench.models import build_variants, token_trace
from cropr.bench.timing import Tell
from cropr.pruning import flops
from cropr.pruning.model import DeployedViT
from cropr.pruning.scorer import FoldedScorer
from workflow.paper.microbench import ProfileSpec

CATEGORIES = (
    "embed", "attention", "mlp", "norm", "residual", "scoring", "selection", "gather", "fusion", "head", "other",
)  # fmt: skip
"""``residual``: the rest of a block, mostly additions. ``selection``: top-k and the positions of
the kept. ``gather``: copying kept and pruned tokens, and rotary rows. ``other``: between all these."""
PRUNING = ("scoring", "selection", "gather", "fusion")
"""Parts that an unpruned model does not have."""

_LABEL = "part:"
_COPIES = ("aten::index_select", "aten::gather", "aten::take_along_dim")


def profile_cells(spec: ProfileSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """A cell a variant: ``tokens``, ``seconds`` (category -> seconds per forward pass) and ``metrics`` (``total_s``,
    ``pruning_share``, ``gmacs``); arguments and errors as of ``microbench.measure.measure``."""
    dtype, cuda = weights_dtype(spec.precision), device.startswith("cuda")
    tell("build")
    models = build_variants(spec.model, spec.variants, spec.image_size, device, dtype)
    images = noise(spec.batch_size, (3, spec.image_size, spec.image_size), device, spec.precision)
    cells: list[dict[str, Any]] = []
    for name, model in models.items():
        tell(f"profile {name}")
        forward = with_attention_kernel(spec.attention, spec.precision, device, partial(model, images))
        with torch.inference_mode():
            run_forced(forward, spec.attention)
            with labelled(model), quiet_profile(cuda) as profile:
                for _ in range(spec.passes):
                    with record_function(f"{_LABEL}other"):
                        forward()
        seconds = _median_pass(profile.function_events or (), spec.passes, cuda)
        total = sum(seconds.values())
        share = sum(seconds[part] for part in PRUNING) / total
        metrics = {"total_s": total, "pruning_share": share, "gmacs": flops.macs(model).total / 1e9}
        cells.append({"tokens": token_trace(model), "seconds": seconds, "metrics": metrics})
    return cells


def _median_pass(events: Iterable[FunctionEvent], count: int, cuda: bool) -> dict[str, float]:
    """Seconds by category of the pass with the median total; on CUDA the device's, else the clock's."""
    # Labels appear once more among the device's own events.
    roots = [e for e in events if e.device_type == DeviceType.CPU and e.cpu_parent is None]
    passes = [_sums(event, cuda) for event in roots if event.name.startswith(_LABEL)]
    assert len(passes) == count
    return sorted(passes, key=lambda sums: sum(sums.values()))[count // 2]


@contextmanager
def labelled(model: nn.Module) -> Iterator[None]:
    """Inside, every part of the model is marked for the profiler."""
    parts = list(_parts(model))
    for module, label in parts:
        module.forward = record_function(f"{_LABEL}{label}")(module.forward)
    try:
        yield
    finally:
        for module, _ in parts:
            del module.forward


def _parts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules with their category; a part of a part is named by the innermost."""
    pruned = model.model if isinstance(model, DeployedViT) else None
    host: Any = model if pruned is None else pruned.backbone.host
    yield host.patch_embed, "embed"
    for block in host.blocks:
        yield block, "residual"
        for name, part in block.named_children():
            for word, category in (("attn", "attention"), ("mlp", "mlp"), ("norm", "norm")):
                if word in name:
                    yield part, category
                    break
    for name, category in (("norm", "norm"), ("fc_norm", "norm"), ("head", "head"), ("head_dist", "head")):
        if isinstance(part := getattr(host, name, None), nn.Module):
            yield part, category
    if pruned is None:
        return
    for reducer in pruned.reducers.values():
        yield reducer, "selection"
        yield from ((part, "scoring") for part in reducer.modules() if isinstance(part, FoldedScorer))
    if pruned.fusion is not None:
        yield pruned.fusion, "fusion"


def _sums(root: FunctionEvent, cuda: bool) -> dict[str, float]:
    """Seconds by category of all below ``root``: own times, which add up to the whole time of ``root``."""
    sums = dict.fromkeys(CATEGORIES, 0.0)
    waiting = [(root, "other")]
    while waiting:
        event, category = waiting.pop()
        if event.name.startswith(_LABEL):
            category = event.name.removeprefix(_LABEL)
        elif event.name in _COPIES and category in ("other", "selection"):
            category = "gather"
        sums[category] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        waiting.extend((child, category) for child in event.cpu_children)
    return sums
