"""The segmenter: places, losses, published counts, hosts, initial weights."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from cases import assert_deployed, host_of
from cases import pictures as images
from test_fusion import scores_of, segmenter
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import nn

import cropr
from cropr.data.ade20k import IGNORE
from cropr.data.layouts import write
from cropr.distributed import World
from cropr.pruning import flops
from cropr.pruning.model import Output
from cropr.pruning.schedule import Schedule
from cropr.pruning.tokens import Tokens
from cropr.specs import ModelSpec, PruneSpec, RecipeSpec, ScenesSpec
from cropr.tasks import TrainSpec, open_task
from cropr.tasks.base import EvaluationSettings, build_model
from cropr.tasks.segmentation import SegDataSpec
from cropr.tasks.segmentation.run import PrunedSegmenter, losses, spread
from cropr.training.checkpoint import load_weights
from cropr.training.loop import train

SCENES = ScenesSpec(image_size=32, train=24, val=6, scale=(1.5, 1.5), objects=(1, 2))
R40 = {"constant": {"rate": 40}}
EVA_L = ModelSpec(name="eva02_large_patch14_224.mim_m38m", args={"patch_size": 16}, drop_path=0.2)


def paper_model(prune):
    with torch.device("meta"):
        return build_model(EVA_L, prune, 150, 512, kind=PrunedSegmenter)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def eva_large():
    return paper_model(PruneSpec(reducer="cropr", schedule=R40, fusion="llf"))


def test_tokens_of_the_paper_model(eva_large):
    assert eva_large.token_trace == (1025, *range(984, 143, -40), 144, 1025)
    assert eva_large.reducers["1"].scorer.queries.shape == (1, 1024, 1024)
    assert eva_large.backbone.host.rope.ref_feat_shape == (16, 16)
    assert eva_large.backbone.host.patch_embed.grid_size == (32, 32)


def test_multiply_adds_of_the_paper_model(eva_large):
    """361 and 203 G an image are the encoder's; scoring by one vector a module adds next to nothing."""
    cost = flops.Cost(eva_large.backbone)
    base, pruned = cost.total((1024,) * 24, False), cost.total(eva_large.counts(1024), True)
    assert base / 1e9 == pytest.approx(361, rel=0.005)
    assert pruned / 1e9 == pytest.approx(203, rel=0.01)
    assert pruned / base == pytest.approx(0.563, abs=0.003)


def test_deployed_queries_cost_one_vector_a_module():
    model = segmenter("llf")
    assert model.reducers["1"].scorer.queries.shape == (1, 16, 32)
    deployed = model.deploy()
    head = 16 * 32 * 5  # 5 classes for each of 17 tokens, one of which the host's own head counts
    cost = flops.Cost(model.backbone).total(model.counts(16), True)
    assert flops.macs(deployed).total == cost + head
    extra = sum(tensor.numel() for tensor in deployed.state_dict().values())
    assert extra - sum(tensor.numel() for tensor in model.backbone.host.state_dict().values()) == 2 * 32


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


def test_rotary_rows_follow_their_tokens():
    """A block gives each token the same, whatever the order of the tokens and however many are away."""
    model = segmenter("llf")
    tokens, position = model.backbone.embed(images())
    expected = model.backbone.run(2, tokens, position)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    shuffled = model.backbone.run(2, tokens.keep(order), position)
    torch.testing.assert_close(shuffled.raster().x, expected.x, rtol=1e-4, atol=1e-5)
    misplaced = Tokens(tokens.keep(order).x, tokens.index, 1)
    assert (model.backbone.run(2, misplaced, position).x - shuffled.x).abs().max() > 0.01


@pytest.mark.parametrize("reducer", ["cropr", "random", "variance", "attn_topk"])
def test_every_reducer_serves_a_segmenter(reducer):
    output = segmenter("llf", reducer=reducer).train()(images())
    assert output.logits.shape == (2, 5, 32, 32)
    assert [aux.shape for aux in output.aux] == ([(2, 16, 5)] * 2 if reducer == "cropr" else [])


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


@pytest.mark.parametrize(
    ("name", "arguments", "what"),
    [
        ("attention-pool", {}, "attention pooling"),
        ("distilled", {}, "second head for distillation"),
        ("vit", {"num_classes": 0}, "no classes"),
    ],
)
def test_hosts_without_a_prediction_per_patch_are_refused(name, arguments, what):
    with pytest.raises(TypeError, match=f"{what}.*, for a prediction per patch, cannot be pruned"):
        cropr.prune(host_of(name, **arguments), Schedule.constant(0), num_outputs=5, kind=PrunedSegmenter)


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


def test_ignored_pixels_and_patches_have_no_gradient():
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    aux = torch.randn(1, 4, 2, requires_grad=True)
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    target[0, :2] = IGNORE
    losses(made(logits, [aux]), target).total.backward()
    assert logits.grad[0, :, :2].abs().sum() == 0
    assert logits.grad[0, :, 2:].abs().min() > 0
    assert aux.grad[0].abs().sum(dim=1).gt(0).tolist() == [False, False, True, True]


def test_gradients_stop_both_ways():
    target = torch.randint(5, (2, 32, 32))
    model = segmenter("llf").train()
    losses(model(images()), target, aux_weight=0).main.backward()
    assert all(p.grad is None for p in model.reducers.parameters())
    model.zero_grad()
    losses(model(images()), target).aux.sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(m.scorer.queries.grad.abs().sum() > 0 for m in model.reducers.values())


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
    args = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    spec = TrainSpec(
        task="segmentation",
        model=ModelSpec(name="eva02_tiny_patch14_224", args=args, drop_path=0.1),
        prune=PruneSpec(reducer="cropr", schedule={"constant": {"rate": 3}}, fusion="llf"),
        data=SegDataSpec(image_size=32, num_classes=11, scenes=SCENES),
        recipe=RecipeSpec(**recipe, curriculum=True, precision="fp32"),
    )
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
