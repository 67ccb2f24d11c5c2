"""Weights of the published EVA-02 detectors (Cascade Mask R-CNN, detectron2's names), by our names.

    detector = build_detector(ModelSpec(name="eva02_large_patch14_224", args={"patch_size": 16}), prune, ...)
    load_eva02(detector, read_checkpoint("eva02_L_coco_det_sys_o365.pth"))

Names of the encoder and of the pyramid follow the authors' sources (EVA-02/det, backbone), those of proposals and heads
detectron2's. No published file was read to compare them; one that differs is refused with the names.

Two kinds of tensors change: the position table (without the row of the class token, resized to the grid), and the
classifiers of the box stages, whose background class moves from the last place to the first.
"""

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from cropr.data.loading import some
from cropr.tasks.detection.model import Detector

_CONVOLUTION = ((r"\.(?=weight)", ".0."), (r"\.norm\.", ".1."))
"""How the names of a convolution without bias, and of its norm, go on."""
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
        (rf"backbone\.simfp_{level + 2}\.{first + place}{theirs}", f"neck.branches.{level}.{place + 1}{ours}")
        for level, first in enumerate((4, 1, 0, 1))
        for place in (0, 1)
        for theirs, ours in _CONVOLUTION
    ),
    # Proposals.
    (r"proposal_generator\.rpn_head\.conv\.conv(\d)\.", r"rpn.head.conv.\1.0."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", r"rpn.head.cls_logits."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", r"rpn.head.bbox_pred."),
    # Heads: convolutions count from 1; the linear layer follows four of them and a flattening.
    *(
        (rf"roi_heads\.{head}{number}{theirs}", f"heads.{place}{number - 1}{ours}")
        for number in (1, 2, 3, 4)
        for head, place in ((r"box_head\.(\d)\.conv", r"stages.\1.head."), (r"mask_head\.mask_fcn", "mask_head.0."))
        for theirs, ours in _CONVOLUTION
    ),
    (r"roi_heads\.box_head\.(\d)\.fc1\.", r"heads.stages.\1.head.5."),
    (r"roi_heads\.box_predictor\.(\d)\.cls_score\.", r"heads.stages.\1.classes."),
    (r"roi_heads\.box_predictor\.(\d)\.bbox_pred\.", r"heads.stages.\1.deltas."),
    (r"roi_heads\.mask_head\.deconv\.", r"heads.mask_head.1."),
    (r"roi_heads\.mask_head\.predictor\.", r"heads.mask_head.3."),
)
"""The beginning of their name, as a pattern, and ours."""

DROP = (
    r"backbone\.net\.(rope_win|rope_glb|blocks\.\d+\.attn\.rope)\.freqs_(cos|sin)"
    r"|proposal_generator\.anchor_generator\.cell_anchors\.\d+|pixel_(mean|std)"
)
"""Constants, which we compute."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a file that torch saved, read without running code. Raises ValueError for other content."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be read without running code ({error}); save its tensors alone") from None
    model = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or not all(isinstance(value, Tensor) for value in model.values()):
        raise ValueError(f"{path}: holds no tensors by name, neither at the top nor under 'model'")
    return dict(model)


def load_eva02(detector: Detector, state: Mapping[str, Tensor]) -> None:
    """Load tensors by detectron2's names; weights of Cropr modules and fusion keep their initial values. Raises
    ValueError with all unknown or missing names and all differing shapes."""
    wanted = {k: v for k, v in detector.state_dict().items() if not k.startswith(("reducers.", "fusion."))}
    taken, problems = dict[str, Tensor](), list[str]()
    for theirs, value in state.items():
        if re.fullmatch(DROP, theirs):
            continue
        ours = next((re.sub(f"^{old}", new, theirs) for old, new in RENAME if re.match(old, theirs)), theirs)
        if ours not in wanted:
            problems.append(f"{theirs} (as {ours}) has no place here")
            continue
        if ours.endswith("host.pos_embed"):
            # Without the class token; bicubic without antialiasing, as the authors' code does in every forward pass.
            places, grid = math.isqrt(value.shape[1]) ** 2, list(detector.backbone.host.patch_embed.grid_size)
            value = resample_abs_pos_embed(value[:, -places:], grid, num_prefix_tokens=0, antialias=False)
        elif ".classes." in ours:
            value = torch.cat((value[-1:], value[:-1]))
        taken[ours] = value
        if value.shape != wanted[ours].shape:
            problems.append(f"{theirs} is {tuple(state[theirs].shape)}, {ours} is {tuple(wanted[ours].shape)}")
    problems += [f"{name} is not in the file" for name in wanted if name not in taken]
    if problems:
        raise ValueError(f"not the checkpoint of such a detector, {len(problems)} differences: {some(problems)}")
    detector.load_state_dict(taken, strict=False)
