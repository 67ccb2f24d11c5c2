"""Parameter groups and learning rates of the authors' recipe, by hand."""

from __future__ import annotations

import pytest
import torch

from cropr.specs import ModelSpec, PruneSpec, RecipeSpec
from cropr.tasks.base import build_model
from cropr.training.optim import create_optimizer, create_schedule, layer_scales, parameter_groups

VIT = ModelSpec(
    name="vit_tiny_patch16_224",
    args={"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "global_pool": "avg", "reg_tokens": 2},
)
CROPR = PruneSpec(reducer="cropr", schedule={"constant": {"rate": 2}}, fusion="llf")


@pytest.fixture(scope="module")
def model():
    return build_model(VIT, CROPR, num_classes=3, image_size=32)


def test_layer_scales_of_depth_4(model):
    scales = layer_scales(model, 0.5)
    names = dict.fromkeys(("patch_embed.proj.weight", "pos_embed", "cls_token", "reg_token"), 0.5**5)
    names |= {"blocks.0.mlp.fc1.weight": 0.5**4, "blocks.3.norm1.bias": 0.5, "fc_norm.weight": 1, "head.weight": 1}
    assert {name: scales[f"backbone.host.{name}"] for name in names} == names
    assert {scale for name, scale in scales.items() if name.startswith("reducers.")} == {1}
    assert set(scales) == {name for name, _ in model.named_parameters()}


def test_layer_scales_of_the_paper_model_and_of_eva():
    large = ModelSpec(name="vit_large_patch16_224", args={"global_pool": "avg"})
    eva = ModelSpec(name="eva02_tiny_patch14_224", args={"patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2})
    with torch.device("meta"):
        scales = layer_scales(build_model(large, PruneSpec(), 1000, 224), 0.75)
        others = layer_scales(build_model(eva, PruneSpec(), 3, 32), 0.5)
    assert scales["backbone.host.patch_embed.proj.weight"] == pytest.approx(7.5e-4, rel=0.01)
    assert scales["backbone.host.blocks.23.attn.qkv.weight"] == 0.75
    assert len(set(scales.values())) == 26  # stem, 24 blocks, the rest
    names = {"pos_embed": 0.5**4, "blocks.2.attn.proj.weight": 0.5, "fc_norm.weight": 1, "head.weight": 1}
    assert {name: others[f"backbone.host.{name}"] for name in names} == names


def test_queries_may_learn_faster_than_the_rest(model):
    plain, fast = (
        {
            name: group["lr_scale"]
            for group in parameter_groups(model, RecipeSpec(query_lr=lr))
            for name in group["names"]
        }
        for lr in (1, 20)
    )
    queries = {name for name in plain if name.endswith("queries")}
    assert queries
    assert {name for name in plain if fast[name] != plain[name]} == queries
    assert {fast[name] for name in queries} == {20}


def test_what_has_no_weight_decay(model):
    decay = {
        name: g["weight_decay"] for g in parameter_groups(model, RecipeSpec(layer_decay=0.75)) for name in g["names"]
    }
    host = "backbone.host."
    for name in ("pos_embed", "cls_token", "reg_token", "blocks.1.attn.qkv.bias", "fc_norm.weight", "head.bias"):
        assert decay[host + name] == 0, name
    for name in (host + "head.weight", host + "patch_embed.proj.weight", "reducers.1.scorer.queries"):
        assert decay[name] == 0.05, name
    assert set(decay) == {name for name, _ in model.named_parameters()}


def rates(recipe: RecipeSpec, steps_per_epoch: float):
    """The learning rate by step."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=recipe.peak_lr)
    schedule = create_schedule(optimizer, recipe, steps_per_epoch)

    def rate(step: int) -> float:
        schedule.step_update(step)
        return optimizer.param_groups[0]["lr"]

    return rate


def test_learning_rates_of_the_paper_recipe():
    assert RecipeSpec().peak_lr == 4e-3
    lr = rates(RecipeSpec(), steps_per_epoch=1251.5)  # 62,575 steps, 6,257 of them warm-up
    assert lr(0) == pytest.approx(6.4e-7, rel=0.01)
    assert lr(6257) == pytest.approx(4e-3, rel=1e-6)
    assert lr(62_574) == pytest.approx(1e-6, rel=1e-3)
    all_ = [lr(step) for step in range(0, 62_575, 25)]
    top = all_.index(max(all_))
    assert all_[: top + 1] == sorted(all_[: top + 1])
    assert all_[top:] == sorted(all_[top:], reverse=True)


def test_polynomial_decay_of_the_authors_segmentation():
    """Batch 8, 64 epochs of 2,527 steps, 2e-5 (1 - t / T) ** 0.9 to 0 without warm-up."""
    recipe = RecipeSpec(epochs=64, batch_size=8, base_lr=6.4e-4, decay="poly", min_lr=0, warmup_epochs=0, layer_decay=1)
    lr = rates(recipe, 2527)
    for step in (0, 1, 80_864, 161_727):
        assert lr(step) == pytest.approx(2e-5 * (1 - step / 161_728) ** 0.9)


def test_without_warm_up_and_in_a_run_of_one_step_the_first_has_the_peak():
    for epochs, warmup, steps in ((2, 0, 5), (0.2, 0.19, 6)):
        recipe = RecipeSpec(epochs=epochs, warmup_epochs=warmup)
        assert rates(recipe, steps)(0) == recipe.peak_lr
    for warmup in (3, 4.5):
        with pytest.raises(ValueError, match=rf"warmup_epochs = {warmup}: must be less than recipe.epochs = 3"):
            rates(RecipeSpec(epochs=3, warmup_epochs=warmup), 5)


def test_update_of_a_step_is_smaller_deeper_down(model):
    """AdamW's first step moves every weight by its learning rate."""
    torch.manual_seed(0)
    trained = build_model(VIT, CROPR, num_classes=3, image_size=32)
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    recipe = RecipeSpec(layer_decay=0.5, weight_decay=0, warmup_epochs=0)
    optimizer = create_optimizer(trained, recipe)
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    create_schedule(optimizer, recipe, 10).step_update(0)
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in trained.named_parameters()}
    scales = layer_scales(trained, 0.5)
    for name, distance in moved.items():
        assert distance == pytest.approx(recipe.peak_lr * scales[name], rel=2e-2), name
