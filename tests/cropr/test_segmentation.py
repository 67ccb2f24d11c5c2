"""The segmenter: places, losses, published counts, hosts, initial weights; scores and windows."""

import json

import pytest
import timm
import tiny
import torch
from cases import assert_deployed, host_of
from cases import pictures as images
from test_fusion import scores_of, segmenter
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import nn
from torch.nn import functional as F

import cropr
from cropr.data.ade20k import IGNORE
from cropr.data.layouts import write
from cropr.distributed import World
from cropr.pruning import flops
from cropr.pruning.model import Output
from cropr.pruning.schedule import Schedule
from cropr.pruning.tokens import Tokens
from cropr.specs import ModelSpec, PruneSpec, ScenesSpec, check
from cropr.tasks import TrainSpec, open_task
from cropr.tasks.base import EvaluationSettings, build_model
from cropr.tasks.segmentation import SegDataSpec
from cropr.tasks.segmentation.run import PrunedSegmenter, count_pixels, losses, predict, predict_sliding, scores, spread
from cropr.training.checkpoint import load_weights
from cropr.training.loop import train

SCENES = ScenesSpec(image_size=32, train=24, val=6, scale=(1.5, 1.5), objects=(1, 2))
EVA_L = ModelSpec(name="eva02_large_patch14_224.mim_m38m", args={"patch_size": 16}, drop_path=0.2)


def test_tokens_and_multiply_adds_of_the_paper_model():
    """361 and 203 G an image are the encoder's; scoring by one vector a module adds next to nothing."""
    prune = PruneSpec(reducer="cropr", schedule={"constant": {"rate": 40}}, fusion="llf")
    with torch.device("meta"):
        model = build_model(EVA_L, prune, 150, 512, kind=PrunedSegmenter)
    assert model.token_trace == (1025, *range(984, 143, -40), 144, 1025)
    assert model.reducers["1"].scorer.queries.shape == (1, 1024, 1024)
    assert model.backbone.host.rope.ref_feat_shape == (16, 16)
    assert model.backbone.host.patch_embed.grid_size == (32, 32)
    cost = flops.Cost(model.backbone)
    base, pruned = cost.total((1024,) * 24, False), cost.total(model.counts(1024), True)
    assert base / 1e9 == pytest.approx(361, rel=0.005)
    assert pruned / 1e9 == pytest.approx(203, rel=0.01)
    assert pruned / base == pytest.approx(0.563, abs=0.003)


class Place(nn.Module):
    """A classifier that says, in its last class, which number a token carries in its first channel."""

    def forward(self, x):
        return torch.cat((torch.zeros_like(x[..., :4]), x[..., :1]), dim=-1)


@pytest.mark.parametrize("fusion", ["concat", "llf", "llf_no_self", "cross"])
@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_predictions_return_to_their_places(fusion, shape):
    """Each patch carries its raster number past blocks that leave tokens alone, through pruning and fusion."""
    host = host_of("vit", img_size=shape, class_token=False, global_pool="avg")
    model = cropr.prune(host, Schedule.constant(4), "random", fusion, kind=PrunedSegmenter).eval()
    for block in host.blocks:
        block.forward = lambda x, **_: x
    host.pos_drop = nn.Identity()
    number = torch.arange(model.backbone.num_patches).float()
    host.norm_pre.forward = lambda x: torch.cat((number[None, :, None].expand(2, -1, 1), x[..., 1:]), dim=-1)
    model.backbone.predict = lambda tokens: tokens.replace(Place()(tokens.x))
    output = model(torch.randn(2, 3, *shape))
    assert output.logits.shape == (2, 5, *shape)
    assert torch.equal(scores_of(model, torch.randn(2, 3, *shape))[..., 4], number.expand(2, -1))
    assert not torch.equal(output.tokens.index, output.tokens.index.sort(dim=1).values)


def test_empty_places_take_the_nearest_survivor():
    """Survivors 0 and 5 of a grid of 2 x 4; place 2 is as far from both and takes the first in raster order."""
    tokens = Tokens(torch.tensor([[[9.0], [5.0], [0.0]]]), torch.tensor([[5, 0]]), prefix=1)
    by_hand = [[0, 0, 5, 5], [0, 5, 5, 5]]
    named = {5: 5.0, 0: 0.0}
    assert spread(tokens, (2, 4))[0, 0].tolist() == [[named[place] for place in row] for row in by_hand]


@pytest.mark.parametrize("reducer", ["cropr", "random", "variance", "attn_topk"])
def test_every_reducer_serves_a_segmenter_but_hosts_without_a_prediction_per_patch(reducer):
    output = segmenter("llf", reducer=reducer).train()(images())
    assert output.logits.shape == (2, 5, 32, 32)
    assert [aux.shape for aux in output.aux] == ([(2, 16, 5)] * 2 if reducer == "cropr" else [])
    for host, what in (
        (host_of("attention-pool"), "attention pooling"),
        (host_of("distilled"), "second head for distillation"),
        (host_of("vit", num_classes=0), "no classes"),
    ):
        with pytest.raises(TypeError, match=f"{what}.*, for a prediction per patch, cannot be pruned"):
            cropr.prune(host, Schedule.constant(0), reducer, num_outputs=5, kind=PrunedSegmenter)


def test_rectangular_images_train_and_deploy():
    model = segmenter("llf", img_size=(24, 48)).train()
    batch, target = images(2, 24, 48), torch.randint(5, (2, 24, 48))
    output = model(batch)
    assert (output.grid, output.logits.shape) == ((3, 6), (2, 5, 24, 48))
    assert losses(output, target).aux.shape == (2,)
    assert_deployed(model.eval(), batch)
    other = segmenter("llf", dynamic_img_size=True)  # evaluation takes other sizes than training
    wide = images(2, 40, 64)
    assert other.deploy()(wide).shape == (2, 5, 40, 64)
    with pytest.raises(ValueError, match=r"16 queries for a grid of 5 x 8 patches.*ties training to one grid"):
        losses(other.train()(wide), torch.zeros(2, 40, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"1 queries for a grid of 4 x 4 patches.*set num_queries to 16"):
        cropr.prune(host_of("eva"), Schedule.constant(2), reducer_options={"num_queries": 1}, kind=PrunedSegmenter)


def made(logits, aux=(), grid=(2, 2)):
    return Output(logits, tuple(aux), Tokens.full(torch.zeros(len(logits), 4, 2), 0), {}, grid)


def test_losses_by_hand():
    """Two classes; certainty for class 0 costs nothing where it is right and 20 where it is not."""
    sure = torch.zeros(1, 2, 4, 4)
    sure[:, 0] = 20
    target = torch.zeros(1, 4, 4, dtype=torch.uint8)
    target[0, 0, :3] = torch.tensor([1, IGNORE, 1])  # of 15 labelled pixels, 2 are wrong
    aux = torch.zeros(1, 4, 2)
    aux[..., 0] = 20  # patches are labelled by their upper left pixels: 1, 1, 0, 0
    result = losses(made(sure, [aux, torch.zeros(1, 4, 2)]), target, aux_weight=0.5)
    assert result.main.item() == pytest.approx(40 / 15)
    assert result.aux.tolist() == pytest.approx([10, 0.693147], rel=1e-5)
    assert result.total.item() == pytest.approx(40 / 15 + 0.5 * 10.693147)
    for left_out, expected in ((0, 20), (1, 0)):  # patches of that class have no part
        aux_loss = losses(made(sure, [aux]), target, aux_ignore=left_out).aux
        assert aux_loss.item() == pytest.approx(expected, abs=1e-6)
    # Ignored pixels and patches have no gradient.
    logits, aux = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(1, 4, 2, requires_grad=True)
    target[0, :2], target[0, 2:] = IGNORE, 0
    losses(made(logits, [aux]), target).total.backward()
    assert logits.grad[0, :, :2].abs().sum() == 0
    assert logits.grad[0, :, 2:].abs().min() > 0
    assert aux.grad[0].abs().sum(dim=1).gt(0).tolist() == [False, False, True, True]


def test_an_ignored_class_that_does_not_exist_is_refused():
    told = {"task": "segmentation", "model": {"name": "vit_tiny_patch16_224"}, "data": {"num_classes": 11}}
    assert check(TrainSpec, {**told, "recipe": {"aux_ignore": 10}}, "spec").recipe.aux_ignore == 10
    with pytest.raises(ValueError, match=r"aux_ignore = 11: must be below data\.num_classes = 11"):
        check(TrainSpec, {**told, "recipe": {"aux_ignore": 11}}, "spec")


def test_timm_resamples_pretrained_weights_to_another_patch_and_image(tmp_path):
    """What brings eva02_large_patch14_224.mim_m38m to patch 16 at 512, in the small: timm's own arguments. The file has
    a mask token, as weights of masked image modelling have; timm then takes their final norm for ``fc_norm``."""
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    source = timm.create_model("eva02_tiny_patch14_224", img_size=28, patch_size=7, num_classes=0, **small)
    nn.init.normal_(source.fc_norm.weight)
    weights = {name.replace("fc_norm", "norm"): value for name, value in source.state_dict().items()}
    torch.save({**weights, "mask_token": torch.zeros(1, 1, 32)}, tmp_path / "weights.pth")
    spec = ModelSpec(
        name="eva02_tiny_patch14_224.mim_in22k",
        args={**small, "patch_size": 8, "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}},
    )
    host = build_model(spec, PruneSpec(), 5, 64, True, PrunedSegmenter).backbone.host
    assert host.pos_embed.shape == (1, 65, 32)
    assert host.patch_embed.proj.weight.shape == (32, 3, 8, 8)
    for name in ("blocks.1.mlp.fc2.weight", "fc_norm.weight", "cls_token"):
        assert torch.equal(host.state_dict()[name], source.state_dict()[name])
    assert torch.equal(host.pos_embed, resample_abs_pos_embed(source.pos_embed, [8, 8]))
    assert torch.equal(host.patch_embed.proj.weight, resample_patch_embed(source.patch_embed.proj.weight, [8, 8]))


def test_a_run_from_scenes_to_record(tmp_path):
    """With curriculum and polynomial decay; the deployed form scores what the record says, at any batch size."""
    recipe = {"epochs": 4, "batch_size": 8, "base_lr": 0.03, "decay": "poly", "min_lr": 0, "warmup_epochs": 0}
    data = SegDataSpec(image_size=32, num_classes=11, scenes=SCENES)
    model = {"model__name": "eva02_tiny_patch14_224", "model__drop_path": 0.1}
    recipe |= {"curriculum": True, "precision": "fp32"}
    spec = tiny.spec(task="segmentation", **model, prune__schedule={"constant": {"rate": 3}}, data=data, recipe=recipe)
    write(SCENES, tmp_path / "data", "ade20k")
    record = train(spec, 0, tmp_path / "data", tmp_path / "run", world=World())
    assert record["tokens"] == [17, 13, 10, 10, 17]
    assert record["metrics"]["val_images"] == 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert all(lines[-1][name] < lines[0][name] for name in ("loss", "aux_loss"))
    task = open_task(spec, tmp_path / "data")
    model = task.build()
    load_weights(model, tmp_path / "run" / "weights.safetensors")
    result = task.evaluate(model.deploy(), EvaluationSettings(batch_size=1))
    for name in ("miou", "macc", "aacc"):
        assert result.metrics[name] == pytest.approx(record["metrics"][name], abs=0.05)


def test_scores_by_hand():
    """Class 2 is labelled alone, class 3 predicted alone, class 4 predicted only where there is no label."""
    labels = torch.tensor([[[0, 0, 1, 1], [2, IGNORE, 1, 1]], [[0, 0, 0, 0], [0, 0, 0, IGNORE]]])
    prediction = torch.tensor([[[0, 1, 1, 1], [3, 2, 1, 1]], [[0, 0, 0, 0], [1, 0, 0, 4]]])
    counts = count_pixels(prediction, labels, 5)
    assert counts[0].tolist() == [[1, 4, 0, 0, 0], [2, 4, 1, 0, 0], [1, 5, 0, 1, 0]]
    assert counts[1].tolist() == [[6, 0, 0, 0, 0], [7, 0, 0, 0, 0], [6, 1, 0, 0, 0]]
    metrics, iou = scores(counts.sum(dim=0))
    expected = [700 / 9, 400 / 6, 0, 0]
    assert (iou[:4], iou[4]) == (pytest.approx(expected), None)
    accuracy = (700 / 9 + 100 + 0) / 3
    assert metrics == pytest.approx({"miou": sum(expected) / 4, "macc": accuracy, "aacc": 1100 / 14})
    with pytest.raises(ValueError, match="no pixel of the validation set is labelled"):
        scores(count_pixels(prediction, torch.full((2, 2, 4), IGNORE), 5).sum(dim=0))


class Recorder:
    """Logits that are a fixed linear map of each pixel, and the windows that were asked for."""

    def __init__(self, shift: bool = False) -> None:
        self.weight = torch.randn(5, 3)
        self.windows: list[torch.Tensor] = []
        self.shift = shift

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.windows.append(images)
        logits = torch.einsum("cd,bdhw->bchw", self.weight, images)
        return logits + len(self.windows) if self.shift else logits


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (8, 13), (17, 9), (5, 20), (3, 2), (24, 31)])
def test_windows_cover_any_image_and_agree_with_a_pixelwise_model_in_any_batch(size):
    for stride in (8, 5, 1):
        images, model = torch.randn(2, 3, *size), Recorder()
        logits = predict_sliding(model, images, 8, stride)
        torch.testing.assert_close(logits, torch.einsum("cd,bdhw->bchw", model.weight, images), rtol=1e-5, atol=1e-5)
        assert {tuple(window.shape) for window in model.windows} == {(2, 3, 8, 8)}
        alone = torch.cat([predict_sliding(model, image[None], 8, stride) for image in images])
        torch.testing.assert_close(logits, alone, rtol=1e-6, atol=1e-6)


def test_windows_by_hand():
    """A row of 10 pixels, windows of 4 every 3: they begin at 0, 3, 6; every third overlap counts half each."""
    model = Recorder(shift=True)
    model.weight = torch.zeros(5, 3)
    logits = predict_sliding(model, torch.arange(10.0).expand(1, 3, 4, 10), 4, 3)
    assert [int(window[0, 0, 0, 0]) for window in model.windows] == [0, 3, 6]
    assert logits[0, 0, 0].tolist() == [1, 1, 1, 1.5, 2, 2, 2.5, 3, 3, 3]
    # Small images are padded with zeros at the right and the bottom.
    model = Recorder()
    assert predict_sliding(model, torch.ones(1, 3, 2, 3), 4, 4).shape == (1, 5, 2, 3)
    (window,) = model.windows
    assert window[0, 0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0] * 4, [0] * 4]
    # Windows in half precision are summed in full.
    assert predict_sliding(lambda x: x.bfloat16(), torch.rand(1, 3, 8, 12), 8, 1).dtype == torch.float32


def test_the_spec_chooses_sliding_windows_or_one_that_is_padded_cropped_and_enlarged():
    images, model = torch.randn(2, 3, 5, 8), Recorder()
    logits = predict(model, images, (10, 16), SegDataSpec(image_size=8, num_classes=5))
    (window,) = model.windows
    assert window.shape == (2, 3, 8, 8)
    assert window[:, :, 5:].abs().max() == 0
    inner = torch.einsum("cd,bdhw->bchw", model.weight, images)
    expected = F.interpolate(inner, (10, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    model = Recorder()
    sliding = SegDataSpec(image_size=8, num_classes=5, evaluation="slide", stride=4)
    assert predict(model, torch.randn(1, 3, 16, 8), (16, 8), sliding).shape == (1, 5, 16, 8)
    assert len(model.windows) == 3
