"""Steps, the loop, checkpoints, initial weights: properties that a wrong trainer breaks."""

import json
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import Signalled, log_lines
from tiny import model as new_model

from cropr.distributed import World
from cropr.tasks.base import Losses
from cropr.tasks.classification.run import Objective
from cropr.training.loop import Settings, TrainingDiverged, TrainingInterrupted, fit, summarise
from cropr.training.optim import Stepper, create_optimizer, seed_step

WORLD = World()


def new_stepper(spec):
    model, task = new_model(spec).train(), Objective(spec.data, spec.prune.aux_weight)
    return Stepper(model, task, create_optimizer(model, spec.recipe), spec.recipe, WORLD)


def train(spec, split, out, seed=0, task=None, model=None, evaluate=None, **settings):
    """A run without its record: the trained model, and the history of its evaluations."""
    model = model or new_model(spec)
    task = task or Objective(spec.data, spec.prune.aux_weight)
    settings = Settings(out=out, **settings)
    history = fit(model, task, tiny.batches(split, spec, seed), spec.recipe, seed, settings, WORLD, evaluate)
    return model, history


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def batch(count=10):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % tiny.CLASSES


class Sabotaged(Objective):
    """Spoils the loss of step ``at``."""

    def __init__(self, data, at, spoil):
        super().__init__(data)
        self.left, self.spoil = at, spoil

    def loss(self, output, target):
        self.left -= 1
        losses = super().loss(output, target)
        return self.spoil(losses) if self.left < 0 else losses


SPOILS = {
    "the loss is nan": lambda own: Losses(own.total * math.nan, own.main * math.nan, own.aux),
    "the auxiliary loss is inf": lambda own: Losses(own.total, own.main, own.aux + math.inf),
    "the gradient norm is nan": lambda own: Losses(own.total + (own.total * 0).sqrt(), own.main, own.aux),
}


@pytest.mark.parametrize("parts", [2, 3, 4, 16])
def test_accumulation_gives_the_gradient_of_the_whole_batch(parts):
    """Also where the batch does not divide (10 into 4) and where there are fewer images than parts."""
    whole, split = new_stepper(tiny.spec()), new_stepper(tiny.spec(recipe__accumulate=parts))
    one, other = whole(*batch()), split(*batch())
    assert other.loss == pytest.approx(one.loss, abs=1e-5)
    assert other.aux_loss == pytest.approx(one.aux_loss, abs=1e-5)
    for (name, mine), theirs in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_step_reports_its_losses():
    spec = tiny.spec()
    stepper = new_stepper(spec)
    images, labels = batch()
    task = Objective(spec.data)
    with torch.no_grad():
        expected = task.loss(stepper.model(images), task.prepare(images, labels)[1])
    result = stepper(images, labels)
    assert result.loss == pytest.approx(expected.main.item(), abs=1e-6)
    assert result.aux_loss == pytest.approx(expected.aux.mean().item(), abs=1e-6)
    assert (result.images, result.stop) == (10, False)
    assert stepper(images, labels, lambda: True).stop
    assert new_stepper(tiny.spec(prune={"reducer": "none"}))(*batch()).aux_loss is None


def test_auxiliary_losses_do_not_reach_the_encoder_through_clipping():
    grads = []
    for weight in (1.0, 1000.0):
        stepper = new_stepper(tiny.spec(recipe__clip_grad=0.1, prune__aux_weight=weight))
        stepper(*batch())
        grads.append({name: p.grad for name, p in stepper.model.named_parameters()})
    encoder = [name for name in grads[0] if not name.startswith("reducers.")]
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in encoder)
    norms = [math.hypot(*(g.norm().item() for name, g in grad.items() if name in encoder)) for grad in grads]
    assert norms[0] == pytest.approx(0.1, rel=1e-3)


def test_loss_scaling_changes_nothing_and_an_overflow_skips_the_step():
    plain, scaled = new_stepper(tiny.spec()), new_stepper(tiny.spec())
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain(*batch())
    scaled(*batch())
    for mine, theirs in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)

    before = weights_of(scaled.model)
    scaled.task = Sabotaged(tiny.spec().data, 0, SPOILS["the gradient norm is nan"])
    result = scaled(*batch())
    assert not math.isfinite(result.grad_norm)
    assert scaled.overflows == 1
    assert scaled.scaler.get_scale() == 2.0**9
    assert same(scaled.model.state_dict(), before)


def test_random_numbers_of_a_step_depend_on_seed_step_and_process():
    draws = []
    for key in ((0, 1, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (1, 0, 0)):
        seed_step(*key)
        draws.append(tuple(torch.rand(3).tolist()))
    assert draws[0] == draws[1]
    assert len(set(draws)) == 5


def test_it_learns_and_writes_each_step_down(split, tmp_path):
    spec = tiny.spec(recipe__epochs=4)
    train(spec, split, tmp_path)
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(24))
    assert [line["epoch"] for line in lines] == [step // 6 for step in range(24)]
    assert set(lines[0]) >= {"lr", "loss", "aux_loss", "grad_norm", "images_per_s", "data_ms", "step_ms"}
    assert max(line["lr"] for line in lines) == pytest.approx(spec.recipe.peak_lr)
    assert lines[-1]["loss"] < 0.85 * lines[0]["loss"]
    assert lines[-1]["aux_loss"] < 0.9 * lines[0]["aux_loss"]
    summary = summarise(tmp_path / "log.jsonl")
    assert summary["images"] == 24 * 8
    assert min(line["step_ms"] for line in lines) <= summary["step_ms"] <= max(line["step_ms"] for line in lines)
    seconds = sum(line["data_ms"] + line["step_ms"] for line in lines) / 1000
    assert summary["train_images_per_s"] == pytest.approx(192 / seconds)


def test_recomputed_activations_change_no_weight(split, tmp_path):
    changes = {"recipe__epochs": 1, "recipe__warmup_epochs": 0, "model__drop_path": 0.3}
    spec = tiny.spec(**changes, recipe__grad_checkpointing=True)
    model, calls = new_model(spec), []
    model.backbone.host.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    train(spec, split, tmp_path / "a", model=model)
    assert len(calls) == 2 * len(log_lines(tmp_path / "a"))
    assert same(model.state_dict(), train(tiny.spec(**changes), split, tmp_path / "b")[0].state_dict())


def test_event_files_and_the_best_weights(split, tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder, purge_step):
            self.seen, self.flush = {}, lambda: None
            writers.append(self)

        def add_scalar(self, name, value, step):
            self.seen.setdefault(name, []).append((step, value))

    writers, kept, scores = [], [], iter([50.0, 70.0, 60.0])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    spec = tiny.spec(recipe__epochs=3, recipe__batch_size=24)

    def evaluate(own):
        kept.append(weights_of(own))
        return {"top1": next(scores)}

    train(spec, split, tmp_path, evaluate=evaluate, evaluate_every=1, tensorboard=True)
    (writer,) = writers
    assert writer.seen["train/loss"] == [(line["step"], line["loss"]) for line in log_lines(tmp_path)]
    assert [value for _, value in writer.seen["val/top1"]] == [50.0, 70.0, 60.0]
    assert same(load_file(tmp_path / "best.safetensors"), kept[1])


def test_a_frozen_encoder_keeps_its_weights(split, tmp_path):
    spec = tiny.spec(recipe__freeze_encoder=True)
    before, after = new_model(spec).state_dict(), train(spec, split, tmp_path)[0].state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    host = "backbone.host.head."
    assert {name for name in changed if name.startswith("backbone.")} == {host + "weight", host + "bias"}
    assert any(name.startswith("reducers.") for name in changed)


@pytest.mark.parametrize(("what", "at"), [*((what, 8) for what in SPOILS), ("the loss is nan", 0)])
def test_what_is_not_finite_stops_the_run(split, tmp_path, what, at):
    spec = tiny.spec()
    with pytest.raises(TrainingDiverged, match=f"^{what} at step {at} ") as caught:
        train(spec, split, tmp_path, task=Sabotaged(spec.data, at, SPOILS[what]))
    checkpoint = tmp_path / "checkpoint" / "step_00000006" if at else "none yet"
    assert f"last checkpoint: {checkpoint}" in str(caught.value)
    assert len(log_lines(tmp_path)) == at + 1
    assert None in log_lines(tmp_path)[-1].values()


def test_a_run_may_end_within_an_epoch_and_evaluates_every_so_many(split, tmp_path):
    spec = tiny.spec(recipe__epochs=1.5)
    train(spec, split, tmp_path / "short")
    lines = log_lines(tmp_path / "short")
    assert [line["epoch"] for line in lines] == [0] * 6 + [1] * 3
    assert lines[-1]["lr"] < 0.3 * spec.recipe.peak_lr  # the cosine has come to its end
    assert [path.name for path in (tmp_path / "short/checkpoint").iterdir()] == ["step_00000009"]
    spec = tiny.spec(recipe__epochs=5, recipe__batch_size=16)
    _, history = train(spec, split, tmp_path / "long", evaluate=lambda _: {"top1": 50.0}, evaluate_every=2)
    assert history == [{"epoch": 2, "top1": 50.0}, {"epoch": 4, "top1": 50.0}]
    with pytest.raises(ValueError, match=r"precision = fp16.*fp32 or bf16"):
        train(tiny.spec(recipe__precision="fp16", recipe__epochs=0), split, tmp_path / "half")


@pytest.mark.parametrize(("number", "ema"), [(signal.SIGTERM, None), (signal.SIGINT, 0.9)])
def test_a_signal_saves_the_run_and_it_goes_on_as_if_undisturbed(split, tmp_path, number, ema):
    augment = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.5}
    spec = tiny.spec(model__drop_path=0.2, data__augment=augment, recipe__ema=ema)
    expected, _ = train(spec, split, tmp_path / "undisturbed")
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match="step_00000004") as caught:
        train(spec, split, tmp_path / "run", task=Signalled(spec.data, 3, number))
    assert caught.value.args[1] == number
    assert signal.getsignal(number) is before
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [0, 1, 2, 3]
    resumed, _ = train(spec, split, tmp_path / "run")
    assert same(expected.state_dict(), resumed.state_dict())
    assert [line["step"] for line in log_lines(tmp_path / "run")] == list(range(12))


def test_the_average_of_the_weights_is_evaluated_and_kept(split, tmp_path):
    """By hand: the recursion over the weights after each step. Training itself does not notice."""
    spec, plain = tiny.spec(recipe__ema=0.8), tiny.spec()
    model, weights, seen = new_model(plain), [], []

    class Watching(Objective):
        def prepare(self, images, labels):
            weights.append(weights_of(model))
            return super().prepare(images, labels)

    train(plain, split, tmp_path / "plain", task=Watching(plain.data), model=model)
    average, expected = weights[0], []
    for step, after in enumerate([*weights[1:], model.state_dict()], start=1):
        average = {name: 0.8 * average[name] + 0.2 * after[name] for name in after}
        expected += [average] if step % 6 == 0 else []

    def evaluate(own):
        seen.append(weights_of(own))
        return {"top1": 1}

    averaged, _ = train(spec, split, tmp_path / "averaged", evaluate=evaluate, evaluate_every=1)
    for found, wanted in zip((*seen, averaged.state_dict()), (*expected, expected[-1]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    losses = [[line["loss"] for line in log_lines(tmp_path / name)] for name in ("plain", "averaged")]
    assert losses[0] == losses[1]


def test_a_checkpoint_of_another_run_is_refused_by_name(split, tmp_path):
    spec = tiny.spec()
    with pytest.raises(TrainingInterrupted):
        train(spec, split, tmp_path, task=Signalled(spec.data, 1, signal.SIGTERM), identity={"spec": "a"})
    with pytest.raises(ValueError, match="spec was a, is b"):
        train(spec, split, tmp_path, identity={"spec": "b"})
    with pytest.raises(ValueError, match="seed was 0, is 7"):
        train(spec, split, tmp_path, seed=7, identity={"spec": "a"})


def test_ten_losses_are_the_ones_on_record(split, tmp_path):
    """Any change of arithmetic, order or augmentation shows in them. With WRITE_LOSSES=1 they are written again."""
    golden = Path(__file__).parent / "assets" / "losses" / "tiny_cropr.json"
    train(tiny.spec(data__augment={"hflip": 0.5, "mixup": 0.8, "smoothing": 0.1}), split, tmp_path)
    lines = log_lines(tmp_path)[:10]
    losses = {key: [round(line[key], 6) for line in lines] for key in ("loss", "aux_loss")}
    if os.environ.get("WRITE_LOSSES"):
        golden.write_text(json.dumps(losses, indent=1) + "\n")
    for key, expected in json.loads(golden.read_text()).items():
        assert losses[key] == pytest.approx(expected, abs=1e-4)
