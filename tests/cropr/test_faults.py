"""Faults of disks, folders, files and users: one clear message, nothing half-written, nothing believed."""

import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from cropr.__main__ import main
from cropr.data import annotations, imagenet
from cropr.pruning.schedule import Schedule
from cropr.records import claimed
from cropr.specs import Refused, ScenesSpec, check, load_yaml
from cropr.tasks.classification.run import Objective
from cropr.training.checkpoint import load_initial, load_weights, save_weights
from cropr.training.loop import Settings, TrainingInterrupted, fit, open_log

MODEL = ["--model", "test_vit", "--image-size", "64", "--rate", "2"]
TRAIN = [*MODEL, "--epochs", "1", "--batch-size", "16"]


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(images), *TRAIN, "--out", str(out)]) == 0
    return out


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")


COMMANDS = [
    ["train", "--data", "IMAGES", *TRAIN],
    ["show", "--run", "RUN", "--data", "IMAGES", "--images", "2"],
    ["data", "scenes", "--train", "2", "--val", "2", "--image-size", "32", "--distractors", "0", "1"],
    ["bench", *MODEL, "--rounds", "3", "--batch-size", "1"],
    ["export", *MODEL, "--rounds", "1", "--batch-size", "1"],
]


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        *((command, fault) for command in COMMANDS[:3] for fault in ("full", "read-only")),
        *(pytest.param(command, "full", marks=pytest.mark.model) for command in COMMANDS[3:]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_full_disk_is_one_message_and_no_file(command, fault, images, trained, tmp_path, caplog, monkeypatch):
    """Writing is refused by the functions that all writers call: a test may run as root, who can write anywhere."""
    out = tmp_path / "out"
    command = [word.replace("IMAGES", str(images)).replace("RUN", str(trained)) for word in command]
    if fault == "read-only":
        tmp_path.joinpath("file").touch()
        out = tmp_path / "file/out"  # no folder can be made below a file
    else:
        monkeypatch.setattr(os, "fsync", no_room)
        monkeypatch.setattr("PIL.Image.Image.save", no_room)
    assert main([*command, "--out", str(out) + ".npz" * (command[0] == "show")]) == 2
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert any(reason in error for reason in ("No space left", "Not a directory", "File exists"))
    left = [file for file in tmp_path.rglob("*") if file.is_file() and file.name not in ("file", "log.jsonl")]
    assert left == [] or command[0] == "data"  # which marks its folder as unfinished


def test_a_folder_has_one_run_and_a_failed_start_leaves_none(tmp_path: Path, images: Path, caplog: Any) -> None:
    with claimed(tmp_path / "run"):
        for command in (["train", "--data", str(images), *TRAIN], COMMANDS[2]):
            assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert caplog.text.count(f"process {os.getpid()} on ") == 2
    wrong = [*TRAIN, "--out", str(tmp_path / "a/b"), "--init", str(images / "train/class_0/000.png")]
    assert main(["train", "--data", str(images), *wrong]) == 2
    assert not (tmp_path / "a").exists()


@pytest.mark.model
def test_ctrl_c_ends_every_verb_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cropr", "bench", "--model", "vit_base_patch16_224", "--rounds", "99"]
    how: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[2]}
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore
    with subprocess.Popen(command, preexec_fn=heeding, **how) as process:
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1].splitlines()[-1] == "interrupted"
    # A shell reports 130 for both; Python ends by the signal itself if it came while code of exec() ran.
    assert process.returncode in (130, -signal.SIGINT)


def test_weights_are_readable_by_umask_and_a_flipped_bit_or_a_nan_is_found(tmp_path: Path) -> None:
    model, path = tiny.model(tiny.spec()), tmp_path / "weights.safetensors"
    before = os.umask(0o022)
    save_weights(path, model)
    os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    load_weights(model, path)
    tensors, content = load_file(path), bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="differs from the checksum in its header"):
        load_weights(model, path)
    tensors["backbone.host.fc_norm.weight"][3] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"not finite in backbone\.host\.fc_norm\.weight"):
        load_initial(model, path)


def test_links_in_a_loop_are_not_followed_and_one_class_is_refused(tmp_path: Path) -> None:
    root = tiny.write_folder(tmp_path)
    before = imagenet.load_splits(root)[0].paths
    (root / "train/class_0/loop").symlink_to("..")
    (root / "train/class_1/self").symlink_to(".")
    assert imagenet.load_splits(root)[0].paths == before
    for split in ("train", "val"):
        for name in ("class_1", "class_2"):
            (root / split / name).rename(tmp_path / f"{split}_{name}")
    imagenet.load_splits(root, problems=(found := list[str]()))
    assert "class_0 is the only class; two or more are needed" in found[0]


def problems_of(name: str = "a.png", **changes: Any) -> str:
    """What is wrong with a file of one image and one annotation."""
    image = {"id": 1, "file_name": name, "height": 4, "width": 4}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0, **changes}
    content = {"images": [image], "annotations": [annotation], "categories": [{"id": 1}]}
    return "\n".join(annotations.read_annotations(Path("x.json"), content)[1])


def test_names_of_images_stay_in_their_folder() -> None:
    for name in ("../../secret.png", "/data/secret.png", "a/../../b.png"):
        assert "leads out of the folder of images" in problems_of(name)


def test_aliases_that_multiply_are_refused_at_once() -> None:
    nine = (f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
    with pytest.raises(ValueError, match="more than 40 aliases") as caught:
        load_yaml("\n".join(["a0: &a0 [1, 1, 1]", *nine]), "spec.yaml")
    assert len(str(caught.value)) < 200
    assert load_yaml("a: &x {b: 1}\nc: *x", "spec.yaml")["c"] == {"b": 1}


# Found by `make torture` (docs/faults.md) ---------------------------------------------------------------------------


@pytest.mark.parametrize("step", [5, 11])
def test_a_signal_at_the_end_of_an_epoch_does_not_lose_its_evaluation(images: Path, tmp_path: Path, step: int) -> None:
    spec, split = tiny.spec(), imagenet.load_splits(images)[0]

    def run(task: Objective) -> list[dict[str, float]]:
        how = {"settings": Settings(out=tmp_path, evaluate_every=1), "evaluate": lambda _: {"top1": 1.0}}
        return fit(tiny.model(spec), task, tiny.batches(split, spec), spec.recipe, 0, **how)

    with pytest.raises(TrainingInterrupted):
        run(tiny.Signalled(spec.data, step, signal.SIGTERM))
    assert [entry["epoch"] for entry in run(Objective(spec.data))] == [1, 2]


def test_a_log_that_is_cut_is_whole_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("1\n2\n3\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(OSError, match="No space"):
            open_log(log, 2)
    assert log.read_text() == "1\n2\n3\n"
    open_log(log, 2).close()
    assert log.read_text() == "1\n2\n"
    open_log(Path(os.devnull), 2).close()
    assert Path(os.devnull).is_char_device()


def test_a_run_that_was_killed_leaves_neither_checkpoint_nor_temporary_file(trained: Path, images: Path) -> None:
    (trained / "checkpoint/step_00000003").mkdir(parents=True)
    (trained / ".weights.safetensors.123.tmp").touch()
    assert main(["train", "--data", str(images), *TRAIN, "--out", str(trained)]) == 0
    assert [file.name for file in trained.iterdir() if file.name.startswith((".", "checkpoint"))] == []


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """Their digest tells a run whether its initial weights changed."""
    model = tiny.model(tiny.spec())
    for number in range(8):
        save_weights(tmp_path / f"{number}.safetensors", model, "0123456789")
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    load_weights(model, tmp_path / "0.safetensors")


NO_NUMBERS = {
    "constant": [{"rate": [3]}, True, {1: 2, "x": 3}],
    "stages": [{"at": 5}, {"at": {"x": 5}}, {"at": {1: 10**400}}, {"at": {1: 4, "1": 5}}],
    **{"kept": [{"at": {float("inf"): 4}}], "fraction": [{"at": {1: float("nan")}}], "squares": [{"at": {1: None}}]},
}


@pytest.mark.parametrize("rule", NO_NUMBERS)
def test_schedules_of_anything_but_numbers_are_refused(rule: str) -> None:
    for values in NO_NUMBERS[rule]:
        with pytest.raises(ValueError, match=r"must be|mapping|unknown|once"):
            Schedule.from_config({rule: values})


def test_scenes_of_any_size_and_options_of_any_type_are_refused(tmp_path: Path) -> None:
    for values in ({"scale": (1, 1e308)}, {"image_size": 10**30}):
        with pytest.raises(Refused):
            check(ScenesSpec, values, "spec")
    for options in ({"num_queries": "x"}, {"num_queries": 10**30}, {"mlp_ratio": -1}):
        with pytest.raises(ValueError, match="reducer 'cropr'"):
            tiny.model(tiny.spec(prune__options=options))


def test_masks_that_make_pycocotools_crash_are_refused() -> None:
    for number in (2**63, float("nan"), 10**400):
        assert "annotation 1: segmentation" in problems_of(segmentation=[[number, 0, 4, 0, 4, 4]])
    for counts in ([4, {}, 12], [4, -4, 16], [4, 400], "4`", "ooooooooo"):
        assert "annotation 1: segmentation" in problems_of(segmentation={"size": [4, 4], "counts": counts})
    assert "segmentation" not in problems_of(segmentation={"size": [4, 4], "counts": [4, 12]})


def test_compressed_run_lengths_are_read_as_pycocotools_writes_them() -> None:
    mask = pytest.importorskip("pycocotools.mask", reason="an extra of the package: cropr[detection]")
    for side in (1, 7, 90):
        region = torch.rand(side, side).numpy() < 0.3
        code = mask.encode(np.asfortranarray(region.astype(np.uint8)))
        assert annotations.wrong_runs(code["counts"].decode(), code["size"]) is None
        assert "add up" in str(annotations.wrong_runs(code["counts"].decode(), [side, side + 1]))
