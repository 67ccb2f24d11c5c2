"""Parameter groups and learning rates of the authors' recipe, by hand; the pruning rate over a run."""

import signal
from contextlib import suppress
from fractions import Fraction
from math import floor

import pytest
import tiny
import torch
from cases import pictures as images
from test_fusion import segmenter

from cropr.pruning.schedule import Schedule
from cropr.specs import ModelSpec, PruneSpec, RecipeSpec
from cropr.tasks.base import build_model
from cropr.tasks.classification.run import Objective
from cropr.training.loop import Settings, TrainingInterrupted, fit
from cropr.training.optim import create_optimizer, create_schedule, layer_scales, parameter_groups, pruning_share

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
        {name: g["lr_scale"] for g in parameter_groups(model, RecipeSpec(query_lr=lr)) for name in g["names"]}
        for lr in (1, 20)
    )
    queries = {name for name in plain if name.endswith("queries")}
    assert queries
    assert {name for name in plain if fast[name] != plain[name]} == queries
    assert {fast[name] for name in queries} == {20}


def test_what_has_no_weight_decay(model):
    groups = parameter_groups(model, RecipeSpec(layer_decay=0.75))
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
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
    # The authors' segmentation: batch 8, 64 epochs of 2,527 steps, 2e-5 (1 - t / T) ** 0.9 to 0 without warm-up.
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


def rates_by_epoch(epochs, rate, steps_per_epoch=5):
    """Tokens a module prunes in each epoch; the same in all steps of one."""
    recipe = RecipeSpec(epochs=epochs, curriculum=True, warmup_epochs=0)
    shares = [pruning_share(recipe, step, steps_per_epoch) for step in range(epochs * steps_per_epoch)]
    assert all(shares[step] == shares[step - step % steps_per_epoch] for step in range(len(shares)))
    return [floor(rate * share) for share in shares[::steps_per_epoch]]


RISING = [0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 18, 19, 20, 21, 23, 24, 25, 27, 28, 29, 30, 32, 33, 34,
          36, 37, 38, 40]  # fmt: skip
"""The authors' list."""


@pytest.mark.parametrize("epochs", [3, 4, 5, 7, 63, 64, 65])
def test_odd_and_even_runs_follow_the_formula_and_are_whole(epochs):
    for rate in (1, 9, 31, 40, 62):
        expected = [min(rate, (2 * rate * epoch) // (epochs - 2)) for epoch in range(epochs)]
        assert rates_by_epoch(epochs, rate) == expected
        assert expected[0] == 0
        assert set(expected[(epochs - 1) // 2 :]) == {rate}
        assert (epochs, rate) != (64, 40) or expected == RISING + 32 * [40]


@pytest.mark.parametrize("epochs", [0.2, 0.5, 1, 2, 1.5, 3.7])
def test_part_epochs_and_short_runs_rise_by_the_step(epochs):
    recipe = RecipeSpec(epochs=epochs, curriculum=True, warmup_epochs=0)
    total = round(epochs * 100)
    shares = [pruning_share(recipe, step, 100) for step in range(total)]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert len(set(shares[: total // 2])) == total // 2  # another one each step
    assert shares[total // 2 - 1] == 1 == shares[-1]


SHARES = [
    (Schedule.constant(25), Fraction(1, 20), (98, 97, 96, 96)),  # floor(25 / 20) = 1, and the extra one
    (Schedule.constant(10), Fraction(1, 11), (100, 100, 100, 100)),  # below one token a module, none at all
    (Schedule.constant(10), Fraction(0), (100, 100, 100, 100)),
    (Schedule.stages({2: 50, 3: 20}), Fraction(1, 3), (100, 84, 77, 77)),  # 16 and 23 away
    (Schedule.fraction({2: 0.5}), Fraction(1, 2), (100, 75, 75, 75)),
    (Schedule.kept({1: 64, 3: 25}), Fraction(1, 2), (82, 82, 63, 63)),
    (Schedule.kept({1: 64, 3: 25}), Fraction(1), (64, 64, 25, 25)),
    (Schedule.stages({2: 50}, align=8), Fraction(1, 2), (100, 80, 80, 80)),  # 75 left, rounded up
]


def test_a_share_of_a_schedule_by_hand():
    for schedule, share, counts in SHARES:
        assert schedule.resolve(100, 4, share=share) == counts
    with pytest.raises(ValueError, match="lower the rate to 32"):  # the whole is checked, whatever the share
        Schedule.constant(40).resolve(100, 4, share=Fraction(1, 40))


@pytest.mark.parametrize("fusion", ["none", "llf", "exit", "cross", "llf_no_self", "concat"])
def test_share_zero_is_the_unpruned_model_with_queries_that_learn(fusion):
    model = segmenter(fusion).train()
    model.ramp(Fraction(0))
    output = model(images())
    plain = segmenter(fusion, schedule=Schedule.constant(0)).train()
    torch.testing.assert_close(output.logits, plain(images()).logits, rtol=0, atol=1e-6)
    assert output.tokens.num_patches == 16
    assert len(output.aux) == len(model.reducers)
    sum(aux.square().sum() for aux in output.aux).backward()
    assert all(module.scorer.queries.grad.abs().sum() > 0 for module in model.reducers.values())


def test_training_prunes_by_the_share_and_evaluation_by_the_whole():
    model = segmenter("llf")
    whole = model(images())
    model.ramp(Fraction(1, 2))
    torch.testing.assert_close(model(images()).logits, whole.logits)
    torch.testing.assert_close(model.deploy()(images()), whole.logits, rtol=0, atol=1e-6)
    assert [index.shape[1] for index in model.train()(images()).kept.values()] == [14, 13]
    model.ramp(Fraction(1))
    assert [index.shape[1] for index in model(images()).kept.values()] == [12, 9]


def test_without_learning_reducers_share_zero_is_the_host_itself():
    model = segmenter("llf", reducer="random").train()
    model.ramp(Fraction(0))
    assert model(images()).kept == {}


def train(spec, split, out, task=None):
    """Trained weights, and the patches alive after the first block in each step."""
    model = tiny.model(spec)
    alive = []
    model.register_forward_hook(lambda _, inputs, output: alive.append(output.kept[1].shape[1]))
    batches = tiny.batches(split, spec)
    with suppress(TrainingInterrupted):
        fit(model, task or Objective(spec.data), batches, spec.recipe, 0, Settings(out=out))
    return model.state_dict(), alive


@pytest.mark.parametrize(("epochs", "steps"), [(5, 15), (1.5, 4)])
def test_a_resumed_run_goes_on_with_the_right_rate(split, tmp_path, epochs, steps):
    """Rate 4 and the extra token of 16; stopped on the way up."""
    spec = tiny.spec(recipe__epochs=epochs, recipe__curriculum=True, model__drop_path=0.2)
    expected, whole = train(spec, split, tmp_path / "undisturbed")
    if epochs == 5:  # shares 0, 2/3 and 1: rates 0, 2 and 4
        assert whole == 6 * [16] + 6 * [13] + 18 * [11]
    _, first = train(spec, split, tmp_path / "run", tiny.Signalled(spec.data, steps - 1, signal.SIGTERM))
    weights, second = train(spec, split, tmp_path / "run")
    assert len(first) == steps
    assert first + second == whole
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
