"""Weights on disk: strict loading, initial weights that differ from the model, detectron2's names."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import model as new_model
from tiny_detector import CLASSES, HOSTS, SHAPE, SIZE, detector
from torch import Tensor

from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks.base import build_model
from cropr.tasks.detection import DetModelSpec
from cropr.tasks.detection.checkpoint import load_eva02, read_checkpoint
from cropr.tasks.detection.model import Detector, build_detector
from cropr.tasks.segmentation.run import PrunedSegmenter
from cropr.training.checkpoint import load_initial, load_weights, save_weights


def test_weights_round_trip_and_a_misfit_lists_all_keys(tmp_path):
    model, other, path = new_model(tiny.spec()), new_model(tiny.spec(), seed=1), tmp_path / "weights.safetensors"
    save_weights(path, model)
    load_weights(other, path)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    tensors = load_file(path)
    tensors["surplus"] = tensors.pop("backbone.host.fc_norm.weight")
    tensors["backbone.host.head.weight"] = torch.zeros(5, 16)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_weights(other, path)
    for part in ("missing 1: backbone.host.fc_norm.weight", "unexpected 1: surplus", "weight [5, 16], in the model [3"):
        assert part in str(caught.value)


@pytest.fixture
def pretrained(tmp_path):
    """Weights of an unpruned model on a 4 x 4 grid, with 3 classes and average pooling."""
    model = new_model(tiny.spec(prune={"reducer": "none"}), seed=5)
    save_weights(tmp_path / "weights.safetensors", model)
    return tmp_path / "weights.safetensors", model.backbone.host.state_dict()


@pytest.mark.parametrize("names", ["unpruned run", "pruned run", "timm"])
def test_pruned_model_starts_from_the_host_of_any_file(pretrained, tmp_path, names):
    """Reducers stay as they are."""
    path, source = pretrained
    if names == "timm":
        save_file(source, path)
    elif names == "pruned run":
        other = new_model(tiny.spec(), seed=6)
        save_weights(path, other)
        source = other.backbone.host.state_dict()
    model = new_model(tiny.spec())
    reducers = {name: p.clone() for name, p in model.reducers.state_dict().items()}
    report = load_initial(model, path)
    assert set(report["loaded"]) == set(source)
    assert report["interpolated"] == report["fresh"] == report["ignored"] == []
    assert all(torch.equal(p, source[name]) for name, p in model.backbone.host.state_dict().items())
    assert all(torch.equal(p, reducers[name]) for name, p in model.reducers.state_dict().items())


def test_positions_are_interpolated_to_another_grid(pretrained):
    path, source = pretrained
    model = new_model(tiny.spec(), size=48)
    assert load_initial(model, path)["interpolated"] == ["pos_embed"]
    position = model.backbone.host.pos_embed
    assert position.shape == (1, 37, 16)
    torch.testing.assert_close(position[:, :1], source["pos_embed"][:, :1])
    torch.testing.assert_close(position[:, 1:].mean(), source["pos_embed"][:, 1:].mean(), atol=2e-3, rtol=0)


def test_classifier_starts_fresh_for_other_classes_and_the_final_norm_may_differ(pretrained, caplog):
    path, _ = pretrained
    model = new_model(tiny.spec(), classes=7)
    before = model.backbone.host.head.weight.clone()
    with caplog.at_level("INFO"):
        report = load_initial(model, path)
    assert set(report["fresh"]) == {"head.weight", "head.bias"}
    assert torch.equal(model.backbone.host.head.weight, before)
    assert "head.weight" in caplog.text
    report = load_initial(new_model(tiny.spec(model__args={**tiny.spec().model.args, "global_pool": "token"})), path)
    assert set(report["fresh"]) == {"norm.weight", "norm.bias"}
    assert set(report["ignored"]) == {"fc_norm.weight", "fc_norm.bias"}


def test_weights_of_another_depth_or_width_are_refused(pretrained, tmp_path):
    path, _ = pretrained
    for change, says in (
        ({"depth": 5}, r"missing 12: blocks\.4\.norm1\.weight"),
        ({"embed_dim": 32}, r"other shape .*pos_embed \[1, 17, 16\], in the model \[1, 17, 32\]"),
    ):
        with pytest.raises(ValueError, match=says):
            load_initial(new_model(tiny.spec(model__args={**tiny.spec().model.args, **change})), path)
    path.write_bytes(b"PK\x03\x04 pickled")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_weights(new_model(tiny.spec()), path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights(new_model(tiny.spec()), tmp_path / "absent.safetensors")


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_detector_starts_from_a_detector_or_from_the_host_of_a_segmenter(tmp_path, task):
    """Reducers stay as they are; beside a segmenter, which gives neither class token nor classifier, heads do too."""
    host, path = ModelSpec(name=HOSTS["eva"], args={**SHAPE, "global_pool": "avg"}), tmp_path / "weights.safetensors"
    segmenter = build_model(host, PruneSpec(), CLASSES + 1, SIZE, kind=PrunedSegmenter)
    donor = detector("eva", {"reducer": "none"}) if task == "detection" else segmenter
    save_weights(path, donor)
    later = detector("eva", spread=False)
    before, theirs = ({name: tensor.clone() for name, tensor in one.state_dict().items()} for one in (later, donor))
    theirs["backbone.host.pos_embed"] = theirs["backbone.host.pos_embed"][:, -64:]
    load_initial(later, path)
    for name, tensor in later.state_dict().items():
        taken = not name.startswith("reducers.") if task == "detection" else name.startswith("backbone.")
        assert torch.equal(tensor, (theirs if taken else before)[name]), name
    if task == "detection":
        with pytest.raises(ValueError, match=r"other shape .*heads\.stages\.0"):
            load_initial(detector("eva", box_width=16), path)


C, D, K, DEPTH, HIDDEN, WIDTH = 16, 8, 5, 3, 42, 12


def _detector() -> Detector:
    """A small EVA-02, pruned, with the published heads but for their width."""
    arguments = {"patch_size": 16, "embed_dim": C, "depth": DEPTH, "num_heads": 2}
    spec = DetModelSpec(window=2, global_blocks=(1, 3), channels=D, box_width=WIDTH)
    prune = PruneSpec(reducer="cropr", schedule={"kept": {"at": {1: 8}}}, fusion="llf")
    return build_detector(ModelSpec(name="eva02_large_patch14_224", args=arguments), prune, spec, K, (64, 96))


def _shapes() -> dict[str, tuple[int, ...]]:
    """The names, from the sources that the module names."""
    shapes: dict[str, tuple[int, ...]] = {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)}

    def layer(name: str, *weight: int, bias: int | None = None) -> None:
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = (bias,)

    def convolution(name: str, inside: int, side: int) -> None:
        layer(name, D, inside, side, side)
        layer(f"{name}.norm", D, bias=D)

    net = "backbone.net"
    layer(f"{net}.patch_embed.proj", C, 3, 16, 16, bias=C)
    shapes[f"{net}.pos_embed"] = (1, 14 * 14 + 1, C)
    for kind in ("rope_win", "rope_glb"):
        shapes |= {f"{net}.{kind}.freqs_{part}": (4, 8) for part in ("cos", "sin")}
    for block in range(DEPTH):
        at = f"{net}.blocks.{block}"
        for norm in ("norm1", "norm2"):
            layer(f"{at}.{norm}", C, bias=C)
        for part in "qkv":
            layer(f"{at}.attn.{part}_proj", C, C)
        shapes |= {f"{at}.attn.{part}_bias": (C,) for part in "qv"}
        shapes |= {f"{at}.attn.rope.freqs_{part}": (4, 8) for part in ("cos", "sin")}
        layer(f"{at}.attn.proj", C, C, bias=C)
        layer(f"{at}.mlp.w1", HIDDEN, C, bias=HIDDEN)
        layer(f"{at}.mlp.w2", HIDDEN, C, bias=HIDDEN)
        layer(f"{at}.mlp.ffn_ln", HIDDEN, bias=HIDDEN)
        layer(f"{at}.mlp.w3", C, HIDDEN, bias=C)
    layer("backbone.simfp_2.0", C, C // 2, 2, 2, bias=C // 2)
    layer("backbone.simfp_2.1", C // 2, bias=C // 2)
    layer("backbone.simfp_2.3", C // 2, C // 4, 2, 2, bias=C // 4)
    layer("backbone.simfp_3.0", C, C // 2, 2, 2, bias=C // 2)
    for level, first, inside in ((2, 4, C // 4), (3, 1, C // 2), (4, 0, C), (5, 1, C)):
        convolution(f"backbone.simfp_{level}.{first}", inside, 1)
        convolution(f"backbone.simfp_{level}.{first + 1}", D, 3)
    rpn = "proposal_generator.rpn_head"
    for number in (0, 1):
        layer(f"{rpn}.conv.conv{number}", D, D, 3, 3, bias=D)
    layer(f"{rpn}.objectness_logits", 3, D, 1, 1, bias=3)
    layer(f"{rpn}.anchor_deltas", 12, D, 1, 1, bias=12)
    for stage in range(3):
        for number in (1, 2, 3, 4):
            convolution(f"roi_heads.box_head.{stage}.conv{number}", D, 3)
        layer(f"roi_heads.box_head.{stage}.fc1", WIDTH, 49 * D, bias=WIDTH)
        layer(f"roi_heads.box_predictor.{stage}.cls_score", K + 1, WIDTH, bias=K + 1)
        layer(f"roi_heads.box_predictor.{stage}.bbox_pred", 4, WIDTH, bias=4)
    for number in (1, 2, 3, 4):
        convolution(f"roi_heads.mask_head.mask_fcn{number}", D, 3)
    layer("roi_heads.mask_head.deconv", D, D, 2, 2, bias=D)
    layer("roi_heads.mask_head.predictor", K, D, 1, 1, bias=K)
    return shapes


def _state() -> dict[str, Tensor]:
    """Each tensor holds a number of its own, so that it can be told where it went."""
    return {name: torch.full(shape, 1.0 + place) for place, (name, shape) in enumerate(_shapes().items())}


def test_every_tensor_finds_its_place():
    detector, state = _detector(), _state()
    load_eva02(detector, state)
    dropped = [name for name in state if "rope" in name or name.startswith("pixel")]
    loaded = {name: tensor for name, tensor in detector.state_dict().items() if not name.startswith("reducers.")}
    # As many numbers as there were tensors, one a place: none came twice, and none is missing.
    values = [tensor.float().mean().round().item() for tensor in loaded.values()]
    assert len(values) == len(set(values)) == len(state) - len(dropped)
    host = "backbone.host.blocks.1"
    for ours, theirs in {
        f"{host}.attn.q_proj.bias": "backbone.net.blocks.1.attn.q_bias",
        f"{host}.mlp.fc1_g.weight": "backbone.net.blocks.1.mlp.w1.weight",
        f"{host}.mlp.fc1_x.bias": "backbone.net.blocks.1.mlp.w2.bias",
        f"{host}.mlp.norm.weight": "backbone.net.blocks.1.mlp.ffn_ln.weight",
        "neck.branches.0.0.3.weight": "backbone.simfp_2.3.weight",
        "neck.branches.0.2.1.bias": "backbone.simfp_2.5.norm.bias",
        "neck.branches.2.1.0.weight": "backbone.simfp_4.0.weight",
        "neck.branches.3.2.0.weight": "backbone.simfp_5.2.weight",
        "rpn.head.conv.1.0.bias": "proposal_generator.rpn_head.conv.conv1.bias",
        "heads.stages.2.head.3.1.weight": "roi_heads.box_head.2.conv4.norm.weight",
        "heads.stages.0.head.5.weight": "roi_heads.box_head.0.fc1.weight",
        "heads.stages.1.deltas.weight": "roi_heads.box_predictor.1.bbox_pred.weight",
        "heads.mask_head.0.0.0.weight": "roi_heads.mask_head.mask_fcn1.weight",
        "heads.mask_head.3.bias": "roi_heads.mask_head.predictor.bias",
    }.items():
        assert torch.equal(loaded[ours], state[theirs]), ours


def test_background_moves_to_the_front_and_positions_are_resized():
    detector, state = _detector(), _state()
    state["roi_heads.box_predictor.0.cls_score.bias"] = torch.arange(K + 1.0)
    table = torch.cat((torch.tensor([-1e6]), torch.arange(14 * 14.0)))
    state["backbone.net.pos_embed"] = table[None, :, None].expand(-1, -1, C)
    load_eva02(detector, state)
    assert detector.heads.stages[0].classes.bias.tolist() == [K, 0, 1, 2, 3, 4]
    positions = detector.backbone.host.pos_embed[0, :, 0].view(4, 6)
    # Nearly a plane as before (bicubic interpolation bends it): 14 / 4 rows of 14 each, 14 / 6 columns of 1.
    torch.testing.assert_close(positions[2, 2] - positions[1, 2], torch.tensor(14 * 3.5), rtol=0.05, atol=0)
    torch.testing.assert_close(positions[1, 3] - positions[1, 2], torch.tensor(14 / 6), rtol=0.05, atol=0)


def test_differences_are_refused_all_at_once():
    state = _state()
    state["backbone.net.blocks.0.attn.extra"] = torch.zeros(1)
    state["ema.decay"] = torch.zeros(1)
    state["roi_heads.mask_head.predictor.bias"] = torch.zeros(K + 1)
    del state["backbone.net.blocks.1.mlp.w3.bias"]
    with pytest.raises(ValueError, match="4 differences") as error:
        load_eva02(_detector(), state)
    for part in ("attn.extra", "ema.decay", "(6,)", "backbone.host.blocks.1.mlp.fc2.bias is not in the file"):
        assert part in str(error.value)


def test_files(tmp_path):
    path = tmp_path / "detector.pth"
    torch.save({"model": {"a": torch.ones(2)}, "iteration": 3}, path)
    assert torch.equal(read_checkpoint(path)["a"], torch.ones(2))
    for model, says in (({"a": 1}, "no tensors by name"), (pytest.approx, "without running code")):
        torch.save({"model": model}, path)
        with pytest.raises(ValueError, match=says):
            read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="No such file"):
        read_checkpoint(tmp_path / "missing.pth")
