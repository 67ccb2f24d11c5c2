"""Two processes train as one does: the same batches in halves give the same weights, but for rounding."""

import os
import socket

import numpy as np
import pytest
import tiny
import tiny_coco
import torch
from safetensors.torch import load_file
from tiny_detector import DETECTION
from torch.nn import functional

from cropr.cli.spec_flags import make_spec
from cropr.data.layouts import write
from cropr.distributed import World, start
from cropr.records import read_record
from cropr.specs import ScenesSpec
from cropr.training import checkpoint, loop

pytestmark = pytest.mark.model

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
    functional.gumbel_softmax, fit = noiseless, loop.fit

    def fit_and_save(model, *rest):
        history = fit(model, *rest)
        checkpoint.save_weights(out / name / f"rank{rank}" / "weights.safetensors", model)
        return history

    loop.fit = fit_and_save
    with start("cpu", threads=1) as world:
        for name, spec in RUNS.items():
            loop.train(spec, 0, images / spec.task, out / name, world=world)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder for each task."""
    root = tmp_path_factory.mktemp("images")
    tiny.write_folder(root / "classification")
    tiny_coco.write_coco(root / "detection", train=30, val=5)
    write(ScenesSpec(image_size=32, train=48, val=6, scale=(1.5, 1.5)), root / "segmentation", "ade20k")
    return root


@pytest.fixture(scope="module")
def two(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_as, (port, images, out), nprocs=2)
    return out


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_as_one(images, two, tmp_path, monkeypatch, run):
    monkeypatch.setattr(functional, "gumbel_softmax", noiseless)
    spec, exact = RUNS[run], RUNS[run].recipe.precision == "fp32"
    loop.train(spec, 0, images / spec.task, tmp_path, world=World())
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
