"""The detector: identity without pruning, batches of mixed sizes, losses, gradients, deployment; its parts by hand."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_detector import CLASSES, HOSTS, PRUNED, SHAPE, detector, detector_spec, images, scene
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks.detection import DetModelSpec
from cropr.tasks.detection.cascade import Anchors, BoxStage, RegionPooler, Regions, match, nms, soft_nms
from cropr.tasks.detection.model import SimpleFeaturePyramid, build_detector, losses

DENSE = {"reducer": "none"}
SCENES = [([(8, 8, 28, 24), (36, 30, 60, 58)], [1, 2]), ([(10, 30, 40, 56)], [3]), ([], [])]
MORE = [([(4, 4, 24, 30), (30, 10, 58, 28), (30, 36, 50, 60)], [2, 3, 1]), ([(20, 20, 52, 44)], [1])]


def _batch(scenes=SCENES):
    pictures, targets = zip(*(scene(boxes, labels) for boxes, labels in scenes), strict=True)
    return torch.stack(pictures), list(targets)


def _same(a, b, tolerance: float = 1e-4) -> None:
    assert torch.equal(a.labels, b.labels)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("host", ["vit", "eva"])
def test_a_schedule_that_keeps_everything_is_the_dense_detector_exactly(host):
    dense = detector(host, DENSE).eval()
    full = detector(host, {**PRUNED, "schedule": {"kept": {"at": {1: 64}}}}).eval()
    full.load_state_dict(dense.state_dict(), strict=False)
    for one, other in zip(dense.detect(images([(64, 64)])), full.detect(images([(64, 64)])), strict=True):
        assert len(one.boxes)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("host", ["vit", "eva"])
def test_pruning_changes_the_detections_and_the_map_is_in_raster_order(host):
    model = detector(host).eval()
    output = model(images([(64, 64)]))
    assert [index.shape[1] for index in output.encoded.kept.values()] == [36, 16]
    assert output.encoded.logits.shape == (1, 32, 8, 8)
    x = output.encoded.tokens.raster().x
    assert torch.equal(output.encoded.logits[0, :, 3, 5], x[0, 3 * 8 + 5])
    dense = detector(host, DENSE).eval()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("reducers.")})
    assert (dense(images([(64, 64)])).encoded.logits - output.encoded.logits).abs().max() > 1e-2


@pytest.mark.parametrize("host", ["vit", "eva"])
def test_detections_do_not_depend_on_the_batch(host):
    """Smaller, rectangular and larger images together, and each alone."""
    model = detector(host, nms="plain" if host == "eva" else "soft").eval()
    sizes = [(64, 64), (40, 64), (33, 21), (90, 64), (64, 100)]
    together = model.detect(images(sizes))
    assert sum(len(found.boxes) for found in together) > 10
    for image, (height, width), found in zip(images(sizes), sizes, together, strict=True):
        _same(model.detect([image])[0], found)
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert found.masks.shape == (len(found.boxes), 28, 28)
        assert set(found.labels.tolist()) <= {1, 2, 3}


@pytest.mark.parametrize("host", ["vit", "eva"])
def test_deployed_is_the_trained_model_in_eval_mode(host):
    model = detector(host).eval()
    fast = model.deploy()
    for one, other in zip(model.detect(images([(64, 64)] * 2)), fast.detect(images([(64, 64)] * 2)), strict=True):
        _same(one, other, 1e-6)
    own = sum(v.numel() for name, v in model.state_dict().items() if not name.startswith("reducers."))
    assert sum(v.numel() for v in fast.state_dict().values()) - own == 2 * 32


@pytest.mark.parametrize("stages", [(0.5, 0.6, 0.7), (0.5,)])
def test_losses_and_gradients(stages):
    model = detector(stages=stages).train()
    pictures, targets = _batch()
    output = model(pictures, targets)
    names = {f"loss_{what}_{k}" for k in range(1, len(stages) + 1) for what in ("classes", "box")}
    assert set(output.losses) == names | {"loss_objectness", "loss_rpn_box_reg", "loss_mask"}
    result = losses(output, targets, CLASSES, aux_weight=2.0)
    torch.testing.assert_close(result.main, sum(output.losses.values()))
    torch.testing.assert_close(result.total, result.main + 2 * result.aux.sum())
    assert result.aux.shape == (2,)
    reducers = {name for name, _ in model.named_parameters() if name.startswith("reducers.")}
    result.aux.sum().backward(retain_graph=True)
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= reducers
    model.zero_grad()
    result.main.backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == reducers
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("prune", [PRUNED, DENSE])
def test_images_without_objects_have_finite_losses(prune):
    model = detector(prune=prune).train()
    image, target = scene([], [])
    output = model(image[None], [target])
    result = losses(output, [target], CLASSES)
    assert result.total.isfinite()
    assert output.losses["loss_mask"] == 0
    assert output.losses["loss_box_3"] == 0
    assert output.losses["loss_classes_1"] > 0
    result.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_boxes_stay_in_float32_under_autocast():
    model = detector()
    pictures, targets = _batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train()(pictures, targets)
        found = model.eval().detect(pictures)
    assert all(loss.dtype == torch.float32 for loss in output.losses.values())
    assert all(found.boxes.dtype == torch.float32 for found in found)


def test_any_image_size_is_rounded_up_to_whole_windows_and_padding_changes_nothing():
    assert detector(size=(40, 65)).canvas == (48, 80)
    assert detector(size=56, window=4, global_blocks=(4,), prune=DENSE).canvas == (64, 64)
    model, (image,) = detector().eval(), images([(40, 50)])
    padded = nn.functional.pad(image, (0, 14, 0, 24))[None]
    _same(model.detect([image])[0], model.detect(padded, [(40, 50)])[0], 1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: detector(prune={**PRUNED, "fusion": "none"}), "brings pruned tokens back"),
        (lambda: detector(prune={**PRUNED, "schedule": {"kept": {"at": {2: 37}}}}), "a multiple of 4, here 36 or 40"),
        (lambda: detector().train()(images([(64, 64)])), "needs targets"),
        (lambda: DetModelSpec(anchor_sizes=(8, 16)), "give one a scale, and one more"),
        (lambda: SimpleFeaturePyramid(16, 8, 16, (4, 1)), "neighbours of 4, 2, 1"),
    ],
)
def test_refuses_by_name(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_auxiliary_losses_by_hand():
    """Two modules, two images, one query, two classes. An image without an object is a target like any other."""
    even, sure = torch.zeros(2, 1, 2), torch.tensor([[[2.0, -2.0]], [[-2.0, -2.0]]])
    targets = [{"labels": torch.tensor(labels, dtype=torch.int64)} for labels in ([1, 1], [])]
    output = SimpleNamespace(losses={"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, encoded=SimpleNamespace(aux=()))
    assert losses(output, targets, 2).aux.shape == (0,)
    output.encoded.aux = (even, sure)
    result = losses(output, targets, 2, aux_weight=2.0)
    torch.testing.assert_close(result.aux, torch.tensor([math.log(2), math.log(1 + math.exp(-2))]))
    torch.testing.assert_close(result.total, 3 + 2 * result.aux.sum())


def test_anchors_by_hand():
    """Unrounded, centred on multiples of the stride; sizes of maps do not shift them, as they would in torchvision."""
    levels = [torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)]
    boxes = Anchors((10, 40), (8, 20))(ImageList(torch.zeros(2, 3, 17, 23), [(17, 23)] * 2), levels)
    assert len(boxes) == 2
    assert boxes[0].shape == ((6 + 1) * 3, 4)
    sides = boxes[0][:, 2:] - boxes[0][:, :2]
    torch.testing.assert_close(sides.prod(dim=1), torch.tensor([100.0] * 18 + [1600.0] * 3))
    torch.testing.assert_close((sides[:, 1] / sides[:, 0])[:3], torch.tensor([0.5, 1.0, 2.0]))
    centres = (boxes[0][:, 2:] + boxes[0][:, :2]) / 2
    assert centres[1::3].tolist() == [[0, 0], [8, 0], [16, 0], [0, 8], [8, 8], [16, 8], [0, 0]]


def test_pooler_reads_coordinates_and_chooses_the_level_by_size():
    """Maps that hold their own x coordinate in pixels: the pooled mean is the box's centre, whatever the level."""
    levels = [((torch.arange(128 // s) + 0.5) * s).expand(1, 1, 128 // s, -1).contiguous() for s in (4, 8, 16)]
    pool = RegionPooler((4, 8, 16), size=32, stride=8)
    boxes = torch.tensor([[10.0, 10, 24, 24], [30, 40, 62, 72], [20, 20, 100, 84]])
    pooled = pool(levels, [boxes], 4)
    torch.testing.assert_close(pooled.mean(dim=(1, 2, 3)), (boxes[:, 0] + boxes[:, 2]) / 2, rtol=0, atol=0.01)
    assert pool.mapper([boxes]).tolist() == [0, 1, 2]
    assert pool(levels, [boxes[:0]], 4).shape == (0, 1, 4, 4)


def test_stage_by_hand():
    stage = BoxStage(detector_spec(), CLASSES, 1)
    boxes = torch.tensor([[0.0, 0, 10, 20], [5, 5, 15, 15]])
    truth = torch.tensor([[1.0, 0, 11, 20], [0, 0, 0, 0]])
    deltas = torch.tensor([[1.0, 0, 0, 0], [3, 3, 3, 3]])  # 10 * 1 px / 10 px: exact for the first
    logits = torch.zeros(2, CLASSES + 1)
    regions = Regions(boxes, torch.tensor([2, 0]), torch.tensor([0, 0]), truth)
    classes, box = stage.loss(logits, deltas, regions)
    torch.testing.assert_close(classes, torch.tensor(4.0).log())
    assert box == 0
    _, box = stage.loss(logits, deltas + 1, regions)
    torch.testing.assert_close(box, torch.tensor(4 / 2.0))
    torch.testing.assert_close(stage.refine(deltas[:1], [boxes[:1]], [(15, 10)])[0], torch.tensor([[1.0, 0, 10, 15]]))


def test_match_by_hand():
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), "labels": torch.tensor([2, 3])}
    boxes = torch.tensor([[0.0, 0, 10, 6], [20, 20, 30, 30], [50, 50, 60, 60]])
    assert match(boxes, target, 0.6).labels.tolist() == [2, 3, 0]
    assert match(boxes, target, 0.7).labels.tolist() == [0, 3, 0]
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert match(boxes, nothing, 0.5).labels.tolist() == [0, 0, 0]


def test_pyramid_and_heads_have_the_published_sizes():
    """Heads of EVA-02-L's detector: 15.3 M parameters a box head, 7.8 M of the pyramid."""
    with torch.device("meta"):
        parts = SimpleFeaturePyramid(1024, 256, 16), BoxStage(DetModelSpec(), 80, 1)
    assert [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts] == pytest.approx([7.8, 15.3], abs=0.05)
    neck = SimpleFeaturePyramid(16, 8, 16)
    assert neck.strides == (4, 8, 16, 32, 64)
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert [level.shape for level in neck(torch.zeros(1, 16, 4, 6))] == [(1, 8, *size) for size in sizes]


@pytest.mark.model
def test_overfits_images():
    model = detector(spread=False).train()
    batch, targets = _batch([*SCENES[:2], *MORE])
    optimizer, steps = torch.optim.AdamW(model.parameters()), 160
    for step in range(steps):
        torch.manual_seed(1000 + step)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 10, 3 * (steps - step) / steps)
        optimizer.zero_grad()
        losses(model(batch, targets), targets, CLASSES).total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    for found, target in zip(model.eval().detect(batch), targets, strict=True):
        objects = len(target["boxes"])
        overlap, best = box_iou(target["boxes"], found.boxes[:objects]).max(dim=1)
        assert (overlap > 0.6).all()
        assert torch.equal(found.labels[best], target["labels"])
        assert (found.masks[:objects].mean(dim=(1, 2)) > 0.6).all()


@pytest.mark.parametrize("host", ["vit", "eva"])
def test_pretrained_weights_come_without_their_class_token(host, tmp_path):
    """At the grid that the weights were made for, and at another, to which timm resamples positions."""
    arguments = {**SHAPE, "num_classes": 0, "img_size": 64, "class_token": True, "global_pool": "avg"}
    donor = timm.create_model(HOSTS[host], **arguments)
    overlay = {"file": str(tmp_path / "weights.safetensors"), "custom_load": False}
    save_file(donor.state_dict(), overlay["file"])
    model = ModelSpec(name=HOSTS[host], args={**SHAPE, "pretrained_cfg_overlay": overlay})
    for size in (64, 96):
        built = build_detector(model, PruneSpec(), detector_spec(), CLASSES, size, pretrained=True).backbone.host
        own, theirs = built.state_dict(), donor.state_dict()
        assert set(theirs) - set(own) <= {"cls_token", *(name for name in theirs if name.startswith("fc_norm"))}
        for name in set(own) - {"pos_embed"}:
            assert torch.equal(own[name], theirs[name]), name
        assert torch.equal(own["pos_embed"], theirs["pos_embed"][:, 1:]) == (size == 64)
        assert own["pos_embed"].shape[1] == (size // 8) ** 2


def crowded(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes in clusters, and scores."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=random) * 60
    boxes = torch.cat((corner, corner + 10 + torch.rand(count, 2, generator=random) * 40), dim=1)
    return boxes, torch.rand(count, classes, generator=random) ** 3


def plain_loop(suppress, boxes, scores, threshold):
    """Box by box, class by class, as the methods are written down: [(score, label, row)] by falling score."""
    overlap, picks = box_iou(boxes, boxes), []
    for label, column in enumerate(scores.T.tolist(), start=1):
        alive = dict(enumerate(column))
        while alive and (score := max(alive.values())) > 0.05:
            best = max(alive, key=alive.__getitem__)
            del alive[best]
            picks.append((score, label, best))
            for row in [row for row in alive if overlap[best, row] > threshold]:
                alive[row] *= 1 - float(overlap[best, row]) if suppress is soft_nms else 0
    return sorted(picks, reverse=True)


@pytest.mark.parametrize("threshold", [0.3, 0.6])
@pytest.mark.parametrize("suppress", [nms, soft_nms])
def test_suppression_equals_the_plain_loop(suppress, threshold):
    boxes, scores = crowded(60, 5)
    expected = plain_loop(suppress, boxes, scores, threshold)
    assert len(expected) > 20
    for limit in (7, 1000):
        picks = suppress(boxes, scores, threshold, 0.05, limit)
        kept = [list(values) for values in zip(*expected[:limit], strict=True)]
        assert [picks.labels.tolist(), picks.index.tolist()] == kept[1:]
        torch.testing.assert_close(picks.scores, torch.tensor(kept[0]))


@pytest.mark.parametrize("suppress", [nms, soft_nms])
def test_nothing_is_left_of_nothing_and_a_copy_is_dropped_within_its_class_alone(suppress):
    for count in (0, 3):  # no box, and no box with a score
        picks = suppress(crowded(count, 1)[0], torch.zeros(count, 4), 0.5, 0.05, 100)
        assert len(picks.index) == len(picks.labels) == len(picks.scores) == 0
        assert picks.index.dtype == picks.labels.dtype == torch.int64
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]])
    picks = suppress(boxes, torch.tensor([[0.9, 0.0], [0.7, 0.8], [0.3, 0.0]]), 0.5, 0.05, 100)
    assert (picks.index.tolist(), picks.labels.tolist()) == ([0, 1, 2], [1, 2, 1])
