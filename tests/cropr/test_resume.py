"""Runs from spec to record: killed and resumed, finished already, through the command line, by two processes."""

import csv
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import tiny_coco
import torch
from safetensors.torch import load_file
from tiny_detector import DETECTION
from torch.nn import functional

from cropr.__main__ import main
from cropr.cli.spec_flags import make_spec
from cropr.data.layouts import write
from cropr.distributed import World, start
from cropr.pruning.methods import REDUCERS
from cropr.records import read_record
from cropr.specs import ScenesSpec
from cropr.tasks.classification import run as classification
from cropr.tasks.detection.run import Detection
from cropr.training import checkpoint
from cropr.training import loop as runs
from cropr.training.loop import TrainingInterrupted, train

ROOT = Path(__file__).parents[2]


def command(spec, images, out, *more):
    return ["train", "--spec", spec.model_dump_json(), "--data", str(images), "--out", str(out), *more]


def steps(out):
    return [line["step"] for line in tiny.log_lines(out)]


def assert_equal_weights(one, other):
    first, second = load_file(one / "weights.safetensors"), load_file(other / "weights.safetensors")
    assert set(first) == set(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.model
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(images, tmp_path):
    """SIGKILL in the middle of an epoch; drop path, mixup, cutmix and erasing draw random numbers."""
    spec = tiny.spec(
        recipe__epochs=8,
        model__drop_path=0.2,
        data__augment={"mixup": 0.8, "cutmix": 1.0, "erasing": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1"},
    )
    out = tmp_path / "killed"
    with subprocess.Popen([sys.executable, "-m", "cropr", *command(spec, images, out)], cwd=ROOT) as process:
        while len(steps(out)) < 9 and process.poll() is None:
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "record.json").exists()
    before = steps(out)
    assert before[-1] % 6 != 5  # lines after the last checkpoint, which ends an epoch, are done again

    assert main(command(spec, images, out)) == 0
    assert main(command(spec, images, tmp_path / "undisturbed")) == 0
    assert_equal_weights(out, tmp_path / "undisturbed")
    assert steps(out) == list(range(48))
    assert not (out / "checkpoint").exists()
    killed, undisturbed = read_record(out), read_record(tmp_path / "undisturbed")
    for key in ("top1", "top5", "loss", "images"):
        assert killed["metrics"][key] == undisturbed["metrics"][key]


def test_half_a_checkpoint_and_half_a_line_are_not_resumed_from(images, tmp_path):
    """What a kill in the middle of a write leaves: an unnamed directory, a cut line."""
    spec = tiny.spec()
    train(spec, 0, images, tmp_path / "whole", world=World())
    out = tmp_path / "cut"
    with patch.object(runs, "write_arrays", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        train(spec, 0, images, out, world=World())
    assert [path.name for path in (out / "checkpoint").glob("step_*")] == ["step_00000012"]
    (out / "checkpoint" / ".tmp_00000099").mkdir()
    (out / "checkpoint" / ".tmp_00000099" / "model.safetensors").write_bytes(b"half")
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 12, "epo')

    train(spec, 0, images, out, world=World())
    assert_equal_weights(out, tmp_path / "whole")
    assert steps(out) == list(range(12))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny.spec(), 3, images, out, world=World())
    return out


def test_record_of_a_run(finished, images):
    record = read_record(finished)
    assert (record["kind"], record["id"], record["seed"]) == ("train", tiny.spec().digest(), 3)
    metrics = record["metrics"]
    assert {"top1", "top5", "loss", "train_images_per_s", "step_ms", "gmacs"} <= set(metrics)
    assert (metrics["images"], metrics["val_images"], metrics["top5"]) == (96, 12, 100)
    weights = load_file(finished / "weights.safetensors")
    assert metrics["parameters"] == sum(p.numel() for p in weights.values())
    extra = sum(p.numel() for name, p in weights.items() if name.startswith("reducers."))
    assert metrics["parameters_training_only"] == extra > 0
    assert record["tokens"] == [17, 12, 8, 8, 17]
    assert record["provenance"]["precision"] == "fp32"
    assert len(record["provenance"]["data_fingerprint"]) == 16
    assert [set(row) for row in record["series"]["scoring"]] == [{"block", "entropy", "aux_top1"}] * 2


def test_a_finished_run_is_neither_repeated_nor_overwritten(finished, images, monkeypatch):
    with pytest.raises(ValueError, match=r"spec\.recipe\.epochs was 2, is 3\. Choose another --out"):
        train(tiny.spec(recipe__epochs=3), 3, images, finished, world=World())
    with pytest.raises(ValueError, match="seed was 3, is 4"):
        train(tiny.spec(), 4, images, finished, world=World())
    monkeypatch.setattr(runs, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert train(tiny.spec(), 3, images, finished, world=World()) == read_record(finished)


def test_initial_weights_must_be_the_run_that_the_spec_names(finished, images, tmp_path):
    source = read_record(finished)["id"]
    spec = tiny.spec(init=source, recipe__epochs=1)
    with pytest.raises(ValueError, match=f"spec.init = {source}: name that run's weights with --init"):
        train(spec, 0, images, tmp_path, world=World())
    with pytest.raises(ValueError, match=f"made by run {source}, spec.init asks for 0123456789"):
        train(tiny.spec(init="0123456789"), 0, images, tmp_path, world=World(), init=finished)
    with pytest.raises(ValueError, match=r"spec.init = random: takes no weights"):
        train(tiny.spec(), 0, images, tmp_path, world=World(), init=finished)
    record = train(spec, 0, images, tmp_path, world=World(), init=finished)
    assert record["metrics"]["images"] == 48


@pytest.mark.model
@pytest.mark.parametrize("name", [name for name in REDUCERS if name != "none"])
def test_every_method_trains(images, tmp_path, name):
    spec = tiny.spec(prune__reducer=name, prune__fusion="none", recipe__epochs=1)
    record = train(spec, 0, images, tmp_path, world=World())
    assert record["tokens"] == [17, 12, 8, 4, 4]
    assert 0 <= record["metrics"]["top1"] <= 100


def test_a_teacher_is_an_unpruned_run_that_the_spec_names(images, tmp_path):
    plain = {"prune__reducer": "none", "prune__schedule": {"constant": {"rate": 0}}, "prune__fusion": "none"}
    teacher = train(tiny.spec(**plain, recipe__epochs=1), 0, images, tmp_path / "teacher", world=World())["id"]
    pruned = {"prune__reducer": "dynamic_vit", "prune__fusion": "none", "recipe__epochs": 1}
    spec = tiny.spec(**pruned, teacher=teacher)
    with pytest.raises(ValueError, match=f"spec.teacher = {teacher}: name that run's weights with --teacher"):
        train(spec, 0, images, tmp_path / "student", world=World())
    other = tiny.spec(**pruned, teacher="0123456789")
    with pytest.raises(ValueError, match=r"made by run .*, spec.teacher asks for 0123456789"):
        train(other, 0, images, tmp_path / "student", world=World(), teacher=tmp_path / "teacher")
    train(spec, 0, images, tmp_path / "student", world=World(), teacher=tmp_path / "teacher")
    train(tiny.spec(**pruned), 0, images, tmp_path / "alone", world=World())
    first, second = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("student", "alone"))
    assert len(first) == len(second), "the teacher is not part of the student"
    assert first != second


def test_weights_of_timm_that_cannot_be_fetched_end_in_one_message(images, tmp_path):
    message = r"vit_tiny_patch16_224: no connection; without a network, .* --init"
    offline = patch.object(classification, "build_model", side_effect=OSError("no connection"))
    with offline, pytest.raises(ValueError, match=message):
        train(tiny.spec(init="timm"), 0, images, tmp_path, world=World())


def test_scenes_must_be_those_of_the_spec(tmp_path):
    scenes = {"image_size": 32, "train": 20, "val": 10, "distractors": [0, 2]}
    spec = tiny.spec(data__scenes=scenes, data__num_classes=10)
    write(spec.data.scenes.model_copy(update={"distractors": (0, 3)}), tmp_path / "scenes")
    with pytest.raises(ValueError, match=r"distractors is .0, 3. there, .0, 2. in the spec"):
        train(spec, 0, tmp_path / "scenes", tmp_path / "run", world=World())
    write(spec.data.scenes, tmp_path / "scenes")
    record = train(spec, 0, tmp_path / "scenes", tmp_path / "run", world=World())
    assert [row["block"] for row in record["series"]["relevance"]] == [0, 1, 2]


@pytest.mark.model
def test_a_user_trains_by_flags_and_evaluates(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "test_vit", "--img-size", "64", "--rate", "2", "--epochs", "2", "--batch-size", "16"]
    flags += ["--patch-size", "8", "--auto-augment", "none", "--evaluate-every", "1", "--set", "recipe.layer_decay=0.8"]
    assert main(["train", "--data", str(images), *flags]) == 0
    (record_file,) = tmp_path.glob("runs/*/seed0/record.json")
    record, folder = read_record(record_file), record_file.parent
    assert record_file.parts[-3] == record["id"]
    spec, metrics = record["spec"], record["metrics"]
    assert (spec["data"]["num_classes"], spec["data"]["image_size"]) == (tiny.CLASSES, 64)
    assert (spec["model"]["args"], spec["data"]["augment"]["auto_augment"]) == ({"patch_size": 8}, None)
    assert (spec["recipe"]["layer_decay"], spec["prune"]["reducer"], spec["prune"]["fusion"]) == (0.8, "cropr", "llf")
    assert len((folder / "log.csv").read_text().splitlines()) == 1 + len(tiny.log_lines(folder))
    shown = capsys.readouterr().out
    assert f"Top-1 {metrics['top1']:.2f} %" in shown
    assert str(folder.relative_to(tmp_path)) in shown
    best = max(epoch["top1"] for epoch in record["series"]["epochs"])
    evaluate = ["evaluate", "--run", str(folder), "--data", str(images), "--out", "evaluated.json"]
    for more, top1 in (([], metrics["top1"]), (["--deployed"], metrics["top1"]), (["--best"], best)):
        assert main([*evaluate, *more]) == 0
        found = read_record("evaluated.json")["metrics"]
        assert found["top1"] == top1
        assert more == ["--best"] or found["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
    assert main(["predict", str(images / "val"), "--run", str(folder), "--out", "found.csv"]) == 0
    with Path("found.csv").open(newline="") as file:
        first = [row for row in csv.DictReader(file) if row["rank"] == "1"]
    assert 100 * sum(Path(row["file"]).parent.name == row["class"] for row in first) / len(first) == metrics["top1"]


def test_weights_of_another_model_and_empty_batches_cannot_be_evaluated(finished, images, caplog):
    other = tiny.spec(model__args__depth=5).model_dump_json()
    weights = ["--spec", other, "--weights", str(finished / "weights.safetensors")]
    assert main(["evaluate", "--data", str(images), *weights]) == 2
    assert "does not fit the model; missing" in caplog.text
    assert main(["evaluate", "--data", str(images), "--run", str(finished), "--batch-size", "0"]) == 2
    assert "--batch-size 0" in caplog.text


WRONG = {
    "recipe.epochs=-1": "recipe.epochs = -1: must be >= 0",
    "recipe.precision=fp8": "'fp32', 'bf16' or 'fp16'",
    "data.scenes.images=3": "data.scenes.images: unknown key; allowed: ",
    'prune.schedule={"rate": 8}': "prune.schedule = {'rate': 8}: ",
    'detector={"window": 16}': "detector = {'window': 16}: classification has no detector",
    "recipe": "--set recipe: write KEY=VALUE",
    "model.name.size=3": "name has no keys below it",
}


def test_a_spec_is_read_from_yaml_and_records_and_bad_values_are_named_with_what_is_allowed(finished, tmp_path):
    (tmp_path / "spec.yaml").write_text("model:\n  name: vit_small_patch16_224\nrecipe: {epochs: 3}\n")
    assert make_spec(str(tmp_path / "spec.yaml")).recipe.epochs == 3
    assert make_spec(str(finished / "record.json")) == tiny.spec()
    for override, message in WRONG.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            make_spec(tiny.spec().model_dump_json(exclude_none=True), [override])


@pytest.mark.model
def test_an_interrupted_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path, monkeypatch):
    root = tiny_coco.write_coco(tmp_path / "coco", train=15, val=5)
    record = train(DETECTION, 0, root, tmp_path / "undisturbed", world=World())
    calls, prepare = itertools.count(), Detection.prepare

    def signalled(self, images, targets):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(self, images, targets)

    with monkeypatch.context() as patch:
        patch.setattr(Detection, "prepare", signalled)
        with pytest.raises(TrainingInterrupted, match="step_00000004"):
            train(DETECTION, 0, root, tmp_path / "run", world=World())
    resumed = train(DETECTION, 0, root, tmp_path / "run", world=World(), workers=1)
    weights = [load_file(tmp_path / name / "weights.safetensors") for name in ("undisturbed", "run")]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    figures = {name: value for name, value in record["metrics"].items() if name.startswith(("box_", "mask_"))}
    assert len(figures) == 16  # of 24; the tiny set has small objects alone
    assert figures == {name: resumed["metrics"][name] for name in figures}
    assert record["tokens"] == [64, 36, 16, 16, 64]
    assert record["metrics"]["images"] == 24  # 12 have an object


def test_a_run_starts_from_a_published_detector(tmp_path, monkeypatch):
    task = Detection(DETECTION, tiny_coco.write_coco(tmp_path / "coco", train=2, val=1))
    model, taken = task.build(), []
    monkeypatch.setattr("cropr.tasks.detection.run.load_eva02", lambda model, tensors: taken.append(tensors))
    torch.save({"model": {"backbone.net.pos_embed": torch.zeros(1, 2, 3)}}, tmp_path / "eva02.pth")
    assert task.load_published(model, tmp_path / "eva02.pth")
    assert list(taken[0]) == ["backbone.net.pos_embed"]
    assert not task.load_published(model, tmp_path / "weights.safetensors")


CHECKPOINTED = {"recipe__epochs": 3, "recipe__grad_checkpointing": True, "recipe__accumulate": 2}
NO_FUSION = {"recipe__epochs": 3, "prune__fusion": "none"}
# Without padding: means are over the labelled pixels of a process.
SCENES = {"image_size": 32, "num_classes": 11, "resize": (1, 1)}
SEGMENTATION = {"task": "segmentation", "model__name": "eva02_tiny_patch14_224", "data": SCENES, "recipe__epochs": 3}
STILL = ["model.drop_path=0", "recipe.epochs=4", "recipe.base_lr=0.005", "recipe.grad_checkpointing=true"]
RUNS = {
    "accumulated": tiny.spec(recipe__epochs=3, recipe__accumulate=3),
    "averaged": tiny.spec(recipe__epochs=3, recipe__ema=0.8),
    "bf16": tiny.spec(recipe__epochs=3, recipe__precision="bf16"),
    "checkpointed": tiny.spec(**CHECKPOINTED),
    "frozen": tiny.spec(**CHECKPOINTED, recipe__freeze_encoder=True),
    # Weights of a reducer that the main loss trains.
    "patch_merger": tiny.spec(**NO_FUSION, prune__reducer="patch_merger"),
    "dynamic_vit": tiny.spec(**NO_FUSION, prune__reducer="dynamic_vit"),
    # The first steps prune nothing, so that weights of the fusion or of the reducer have no gradient.
    "idle_fusion": tiny.spec(**CHECKPOINTED, recipe__curriculum=True, prune__reducer="variance", prune__fusion="cross"),
    "idle_reducer": tiny.spec(**NO_FUSION, recipe__curriculum=True, prune__reducer="dpc_knn"),
    "segmentation": tiny.spec(**SEGMENTATION | CHECKPOINTED, recipe__ema=0.8),
    "segmentation_bf16": tiny.spec(**SEGMENTATION, recipe__precision="bf16"),
    "detection": make_spec(DETECTION.model_dump(mode="json"), STILL),
}


def noiseless(logits, hard):
    """Gumbel softmax without its noise, which each process draws for itself."""
    soft = logits.softmax(dim=2)
    return functional.one_hot(soft.argmax(dim=2), 2) - soft.detach() + soft


def _train_as(rank, port, images, out):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    functional.gumbel_softmax, fit = noiseless, runs.fit

    def fit_and_save(model, *rest):
        history = fit(model, *rest)
        checkpoint.save_weights(out / name / f"rank{rank}" / "weights.safetensors", model)
        return history

    runs.fit = fit_and_save
    with start("cpu", threads=1) as world:
        for name, spec in RUNS.items():
            runs.train(spec, 0, images / spec.task, out / name, world=world)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder for each task."""
    root = tmp_path_factory.mktemp("images")
    tiny.write_folder(root / "classification")
    tiny_coco.write_coco(root / "detection", train=30, val=5)
    write(ScenesSpec(image_size=32, train=48, val=6, scale=(1.5, 1.5)), root / "segmentation", "ade20k")
    return root


@pytest.fixture(scope="module")
def two(sets, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_as, (port, sets, out), nprocs=2)
    return out


@pytest.mark.model
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_as_one(sets, two, tmp_path, monkeypatch, run):
    """The same batches in halves give the same weights, but for rounding."""
    monkeypatch.setattr(functional, "gumbel_softmax", noiseless)
    spec, exact = RUNS[run], RUNS[run].recipe.precision == "fp32"
    runs.train(spec, 0, sets / spec.task, tmp_path, world=World())
    ranks = [load_file(two / run / f"rank{rank}" / "weights.safetensors") for rank in (0, 1)]
    expected, found = (load_file(path / "weights.safetensors") for path in (tmp_path, two / run))
    for name, weights in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert torch.equal(ranks[0][name], found[name]), name
        if run != "idle_reducer" or not name.endswith("weight.bias"):  # it cancels: its gradient is rounding alone
            # In bf16, a gradient differs in its third digit; a step changes a weight by up to 1e-3.
            torch.testing.assert_close(found[name], weights, atol=1e-5 if exact else 2e-3, rtol=0, msg=name)
    alone, together = (read_record(path)["metrics"] for path in (tmp_path, two / run))
    same = [name for name in alone if exact and name not in ("step_ms", "train_images_per_s")]
    assert [together[name] for name in same] == [pytest.approx(alone[name], abs=1e-3) for name in same]
    assert len(tiny.log_lines(two / run)) == len(tiny.log_lines(tmp_path)) >= 18
    own, joined = (np.load(path / read_record(path)["per_image"]) for path in (tmp_path, two / run))
    assert own["image"].tolist() == joined["image"].tolist()
