"""The pruning rate over a run: the authors' list, part epochs, what training and evaluation see, resumption."""

from __future__ import annotations

import signal
from contextlib import suppress
from fractions import Fraction
from math import floor

import pytest
import tiny
import torch
from cases import pictures as images
from test_fusion import segmenter

from cropr.data.imagenet import load_splits
from cropr.pruning.schedule import Schedule
from cropr.specs import RecipeSpec
from cropr.tasks.classification.run import Objective
from cropr.training.loop import Settings, TrainingInterrupted, fit
from cropr.training.optim import pruning_share


def rates(epochs, rate, steps_per_epoch=5):
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
        assert rates(epochs, rate) == expected
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


@pytest.fixture(scope="module")
def folder(request):
    return load_splits(request.getfixturevalue("images"))[0]


def train(spec, folder, out, task=None):
    """Trained weights, and the patches alive after the first block in each step."""
    model = tiny.model(spec)
    alive = []
    model.register_forward_hook(lambda _, inputs, output: alive.append(output.kept[1].shape[1]))
    batches = tiny.batches(folder, spec)
    with suppress(TrainingInterrupted):
        fit(model, task or Objective(spec.data), batches, spec.recipe, 0, Settings(out=out))
    return model.state_dict(), alive


@pytest.mark.parametrize(("epochs", "steps"), [(5, 15), (1.5, 4)])
def test_a_resumed_run_goes_on_with_the_right_rate(folder, tmp_path, epochs, steps):
    """Rate 4 and the extra token of 16; stopped on the way up."""
    spec = tiny.spec(recipe__epochs=epochs, recipe__curriculum=True, model__drop_path=0.2)
    expected, whole = train(spec, folder, tmp_path / "undisturbed")
    if epochs == 5:  # shares 0, 2/3 and 1: rates 0, 2 and 4
        assert whole == 6 * [16] + 6 * [13] + 18 * [11]
    _, first = train(spec, folder, tmp_path / "run", tiny.Signalled(spec.data, steps - 1, signal.SIGTERM))
    weights, second = train(spec, folder, tmp_path / "run")
    assert len(first) == steps
    assert first + second == whole
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
