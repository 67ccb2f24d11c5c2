"""The published EVA-02 detectors (Cascade Mask R-CNN, detectron2's names) into ours, every tensor accounted for.

    detector = build_detector(ModelSpec(name="eva02_large_patch14_224", args={"patch_size": 16}), prune, ...)
    load_eva02(detector, read_checkpoint("eva02_L_coco_det_sys_o365.pth"))

Names of the encoder and of the pyramid follow the authors' sources (EVA-02/det, backbone), those of proposals and heads
detectron2's. Both were read, no checkpoint was: it is not verified that a published file has these names and no
others, nor whether it holds the averaged weights. A file that differs is refused with the keys in question.

Three tensors change on the way: the position table (the class token's row goes, the rest is resized to the grid),
and the classifiers of the box stages, whose background class moves from the last place to the first.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from cropr.tasks.detection.model import Detector

RENAME: tuple[tuple[str, str], ...] = (
    # Encoder.
    (r"backbone\.net\.(pos_embed|patch_embed\.proj\.\w+)", r"backbone.host.\1"),
    (r"backbone\.net\.(blocks\.\d+\.)attn\.([qv])_bias", r"backbone.host.\1attn.\2_proj.bias"),
    (r"backbone\.net\.(blocks\.\d+\.(?:norm[12]|attn\.(?:[qkv]_)?proj)\.\w+)", r"backbone.host.\1"),
    (r"backbone\.net\.(blocks\.\d+\.)mlp\.w1\.", r"backbone.host.\1mlp.fc1_g."),
    (r"backbone\.net\.(blocks\.\d+\.)mlp\.w2\.", r"backbone.host.\1mlp.fc1_x."),
    (r"backbone\.net\.(blocks\.\d+\.)mlp\.ffn_ln\.", r"backbone.host.\1mlp.norm."),
    (r"backbone\.net\.(blocks\.\d+\.)mlp\.w3\.", r"backbone.host.\1mlp.fc2."),
    # Pyramid: simfp_2 is the level of stride 4. Resampling, then two convolutions, all numbered in one row.
    (r"backbone\.simfp_2\.([013])\.(\w+)", r"neck.branches.0.0.\1.\2"),
    (r"backbone\.simfp_3\.0\.(\w+)", r"neck.branches.1.0.0.\1"),
    *(
        (rf"backbone\.simfp_{level + 2}\.{first + place}\.{theirs}", rf"neck.branches.{level}.{place + 1}.{ours}.")
        for level, first in enumerate((4, 1, 0, 1))
        for place in (0, 1)
        for theirs, ours in ((r"(?=weight)", 0), (r"norm\.", 1))
    ),
    # Proposals.
    (r"proposal_generator\.rpn_head\.conv\.conv(\d)\.", r"rpn.head.conv.\1.0."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", r"rpn.head.cls_logits."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", r"rpn.head.bbox_pred."),
    # Heads: convolutions count from 1; the linear layer follows four of them and a flattening.
    *(
        (rf"roi_heads\.box_head\.(\d)\.conv{number}\.{theirs}", rf"heads.stages.\1.head.{number - 1}.{ours}.")
        for number in (1, 2, 3, 4)
        for theirs, ours in ((r"(?=weight)", 0), (r"norm\.", 1))
    ),
    (r"roi_heads\.box_head\.(\d)\.fc1\.", r"heads.stages.\1.head.5."),
    (r"roi_heads\.box_predictor\.(\d)\.cls_score\.", r"heads.stages.\1.classes."),
    (r"roi_heads\.box_predictor\.(\d)\.bbox_pred\.", r"heads.stages.\1.deltas."),
    *(
        (rf"roi_heads\.mask_head\.mask_fcn{number}\.{theirs}", rf"heads.mask_head.0.{number - 1}.{ours}.")
        for number in (1, 2, 3, 4)
        for theirs, ours in ((r"(?=weight)", 0), (r"norm\.", 1))
    ),
    (r"roi_heads\.mask_head\.deconv\.", r"heads.mask_head.1."),
    (r"roi_heads\.mask_head\.predictor\.", r"heads.mask_head.3."),
)
"""Their name, as a pattern for its beginning, and ours."""

DROP: tuple[str, ...] = (
    r"backbone\.net\.(rope_win|rope_glb|blocks\.\d+\.attn\.rope)\.freqs_(cos|sin)",
    r"proposal_generator\.anchor_generator\.cell_anchors\.\d+",
    r"pixel_(mean|std)",
)
"""Constants, which are computed here."""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file by name: safetensors, or what torch saved, by its loader that runs no code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds more than tensors, or no model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should hold the weights of an EVA-02 detector")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"{path}: cannot be read without running code from it ({error}); save its tensors alone"
        ) from None
    model = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or not all(isinstance(value, Tensor) for value in model.values()):
        raise ValueError(f"{path}: holds no tensors by name, neither by itself nor under 'model'")
    return dict(model)


def load_eva02(detector: Detector, state: Mapping[str, Tensor], fresh: Sequence[str] = ()) -> list[str]:
    """Load a published detector; what pruning adds for training keeps its initial weights.

    Args:
        detector: its encoder is an ``eva02_*`` of timm, its heads have the published sizes.
        state: tensors by detectron2's names.
        fresh: our names, with ``*``, that keep their initial weights; what the file has for them is dropped. For a
            file of other classes, or without masks: ``("heads.stages.*.classes.*", "heads.mask_head.*")``.

    Returns:
        Names of the file that were dropped.

    Raises:
        ValueError: tensors that have no place here, places that have no tensor, shapes that differ; all of them.
    """
    wanted = {
        name: value
        for name, value in detector.state_dict().items()
        if not name.startswith(("reducers.", "fusion.")) and not _any(name, fresh)
    }
    taken: dict[str, Tensor] = {}
    dropped, problems = [], []
    for theirs, value in state.items():
        ours = rename(theirs)
        if ours is None or _any(ours, fresh):
            dropped.append(theirs)
        elif ours not in wanted:
            problems.append(f"{theirs} (as {ours}) has no place here")
        else:
            taken[ours] = _adapted(ours, value, detector)
            if taken[ours].shape != wanted[ours].shape:
                problems.append(f"{theirs} is {tuple(value.shape)}, {ours} is {tuple(wanted[ours].shape)}")
    problems += [f"{name} is not in the file" for name in wanted if name not in taken]
    if problems:
        shown = "; ".join(problems[:20]) + ("; ..." if len(problems) > 20 else "")
        raise ValueError(f"not the checkpoint of such a detector, {len(problems)} differences: {shown}")
    detector.load_state_dict(taken, strict=False)
    return dropped


def rename(theirs: str) -> str | None:
    """Our name of a tensor, None for what is dropped; a name that is not known is returned as it is."""
    if any(re.fullmatch(pattern, theirs) for pattern in DROP):
        return None
    for pattern, ours in RENAME:
        if re.match(pattern, theirs):
            return re.sub(f"^{pattern}", ours, theirs)
    return theirs


def _adapted(ours: str, value: Tensor, detector: Detector) -> Tensor:
    """The three tensors that change, others as they are."""
    if ours.endswith("host.pos_embed"):
        return resize_positions(value, detector.backbone.host.patch_embed.grid_size)
    if ".classes." in ours:
        return torch.cat((value[-1:], value[:-1]))
    return value


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """[1, rows columns, C] of a square table [1, n, C], with or without a class token in front.

    Bicubic without antialiasing, as the authors' code resizes it in every forward pass.
    """
    if math.isqrt(table.shape[1]) ** 2 != table.shape[1]:
        table = table[:, 1:]
    side = math.isqrt(table.shape[1])
    if (side, side) == tuple(grid):
        return table
    square = table.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=tuple(grid), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(table.dtype)


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
