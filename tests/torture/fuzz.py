"""Broken input for everything that reads a user's files or values: success, or one of the project's own errors.

An input is a function of (seed, family, index). A family runs in a process of its own, so that a crash in C code is
counted as one and the next input follows.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import mmap
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import tiny_coco
import torch
import yaml
from PIL import Image
from synthetic import write_results

from cropr.bench.specs import BenchSpec, PlanSpec
from cropr.cli.spec_flags import make_spec, read_values
from cropr.data import ade20k, annotations, coco
from cropr.data.loading import decode
from cropr.pruning.methods import REDUCERS
from cropr.pruning.schedule import Schedule, ramp, trace
from cropr.records import read_record, write_record
from cropr.specs import PruneSpec, ScenesSpec, check, load_yaml
from cropr.tasks import TrainSpec
from cropr.tasks.base import build_model
from cropr.training.checkpoint import load_checkpoint, load_initial, load_weights, save_checkpoint
from cropr.training.optim import create_optimizer
from workflow.paper import records
from workflow.paper.configuration import ArtefactConfig, ScaleConfig
from workflow.paper.microbench import MEASURES

ROOT = Path(__file__).parents[2]
SECONDS = 5
"""An input that takes longer hangs."""
DECLARED = (ValueError, OSError)
"""What ``python -m cropr`` turns into one message; FileNotFoundError is an OSError."""
NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.5, 1e-320, 1e308, math.nan, math.inf,
    -math.inf, "", "x", "1", "nan", "none", "cropr", "llf", "\ud800", "é" * 300, [], [1], [None], ["x", "x"], [math.nan] * 2,
    {}, {"a": 1}, {"at": {"1": 4}}, {"constant": {"rate": 3}}, {"stages": {"at": {"1": 4, "x": 2}}}, [[[]]], {"": {}},
]  # fmt: skip
Family = Callable[[Path], Callable[[random.Random], object]]
"""Makes what all inputs of a family share, in a folder of its own, and returns what tries one input."""


class Hang(BaseException):
    """An input took too long. No handler of the library catches it."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container below a value with every key or index of it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def changed(value: Any, dice: random.Random, most: int = 3) -> Any:
    """A copy with up to ``most`` changes: a value replaced, scaled, removed, repeated, or an unknown key added."""
    value = copy.deepcopy(value)
    for _ in range(dice.randint(1, most)):
        if not (found := list(places(value))):
            return dice.choice(NASTY)
        container, key = dice.choice(found)
        match dice.randrange(8):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.append(copy.deepcopy(container[key]))
            case 1 | 2 if isinstance(container, dict):
                container[dice.choice(["x", "", "seed", str(key) * 2])] = dice.choice(NASTY)
            case 3 if isinstance(container[key], int | float):
                container[key] = dice.choice([-1, 10, 1e9, 1e300]) * (container[key] if abs(container[key]) < 1e6 else 1)
            case 4:
                container[key] = copy.deepcopy(dice.choice(found)[0])
            case _:
                container[key] = copy.deepcopy(dice.choice(NASTY))
    return value


def damaged(content: bytes, dice: random.Random, head: int = 64) -> bytes:
    """Bytes with a cut, flipped bits, or a few bytes removed, repeated or set; half of all places are in the head."""
    data = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 8])):
        place = dice.randrange(max(1, min(len(data), dice.choice([head, len(data)]))))
        match dice.randrange(6):
            case 0:
                del data[place:]
            case 1:
                del data[place : place + dice.randint(1, 8)]
            case 2:
                data[place:place] = data[place : place + dice.randint(1, 64)]
            case 3:
                data[place : place + 4] = dice.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\x40\0"])
            case _:
                data[place : place + 1] = bytes(byte ^ 1 << dice.randrange(8) for byte in data[place : place + 1])
    return bytes(data)


def mended(png: bytes) -> bytes:
    """A PNG file with the checksums that its chunks should have, so that damage reaches the decoder."""
    data, place = bytearray(png), 8
    while place + 12 <= len(data) and (end := place + 8 + int.from_bytes(data[place : place + 4])) + 4 <= len(data):
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4)
        place = end + 4
    return bytes(data)


def configuration(folder: Path) -> Callable[[random.Random], object]:
    """Specifications of every kind and the workflow's own YAML, as values, as text, and as text with damaged bytes."""
    detector = {"task": "detection", "model": {"name": "vit"}, "data": {"image_size": 64}, "detector": {"window": 2}}
    prune = {"reducer": "cropr", "schedule": {"stages": {"at": {"1": 4}}}, "fusion": "llf", "options": {"mlp": False}}
    compared = {"model": {"name": "vit", "args": {"depth": 4}}, "prune": prune, "image_size": 64}
    valid: list[tuple[Any, Any]] = [
        (TrainSpec, tiny.spec().model_dump(mode="json")),
        (TrainSpec, {**compared, "task": "segmentation", "data": {"scenes": {}}} | {"image_size": 8}),
        (TrainSpec, TrainSpec.model_validate(detector).model_dump(mode="json")),
        (BenchSpec, BenchSpec.model_validate(compared).model_dump(mode="json")),
        (PlanSpec, {**compared, "prune": {"reducer": "cropr"}, "targets": [1.5, 2]}),
        (PruneSpec, prune),
        (ScenesSpec, ScenesSpec(objects=(1, 2)).model_dump(mode="json")),
        *((kind, kind(measure=name).model_dump(mode="json")) for name, kind in MEASURES.items()),
        *((ScaleConfig, yaml.safe_load(file.read_text())) for file in (ROOT / "config/scales").glob("*.yaml")),
        *((ArtefactConfig, yaml.safe_load(file.read_text())) for file in (ROOT / "config/experiments").glob("*.yaml")),
    ]

    def attempt(dice: random.Random) -> None:
        kind, values = dice.choice(valid)
        values, form = changed(values, dice), dice.randrange(4)
        if form == 0:  # as a file, which may be damaged
            path = folder / "spec.yaml"
            text = json.dumps(values) if dice.random() < 0.5 else yaml.safe_dump(values, allow_unicode=False)
            path.write_bytes(damaged(text.encode(), dice, 200) if dice.random() < 0.7 else text.encode())
            values = read_values(str(path))
        elif form == 1:
            values = load_yaml(json.dumps(values), "spec")
        spec = check(kind, values, "spec")
        if form == 2 and hasattr(spec, "digest"):
            keys = [key for key in values if isinstance(key, str)] or ["x"]
            make_spec(values, [f"{dice.choice(keys)}={json.dumps(dice.choice(NASTY))}"], kind).digest()

    return attempt


def methods(_: Path) -> Callable[[random.Random], object]:
    """Tiny models with changed options, schedules and fusions of every method."""
    model = tiny.spec().model

    def attempt(dice: random.Random) -> None:
        name = dice.choice(list(REDUCERS))
        options = {option: dice.choice(NASTY) for option in REDUCERS[name].options if dice.random() < 0.5}
        prune = {"reducer": name, "schedule": {"constant": {"rate": 2}}, "fusion": "none", "options": options}
        build_model(model, check(PruneSpec, changed(prune, dice, 1), "spec"), 3, 32)

    return attempt


def schedules(_: Path) -> Callable[[random.Random], object]:
    """Constructors, configurations, and their resolution against models of any size."""

    def number(dice: random.Random) -> Any:
        return dice.choice(NASTY) if dice.random() < 0.2 else dice.choice([dice.randint(0, 40), dice.random()])

    def at(dice: random.Random) -> Any:
        keys = [dice.choice([number(dice), dice.randint(1, 12)]) for _ in range(dice.randint(0, 4))]
        return {key if isinstance(key, Hashable) else "x": number(dice) for key in keys}

    def attempt(dice: random.Random) -> None:
        rule = dice.choice(["constant", "stages", "fraction", "kept", "squares"])
        what = number(dice) if rule == "constant" or dice.random() < 0.1 else at(dice)
        align = dice.choice([1, 8, number(dice)])
        if dice.random() < 0.5:
            schedule = getattr(Schedule, rule)(what, **({} if rule == "squares" else {"align": align}))
        else:
            config = {rule: {"rate" if rule == "constant" else "at": what, "align": align}}
            schedule = Schedule.from_config(changed(config, dice) if dice.random() < 0.5 else config)
        assert Schedule.from_config(json.loads(json.dumps(schedule.to_config()))) == schedule, "not what was written"
        schedule.describe(), schedule.sites(dice.randint(0, 50), dice.random() < 0.5)
        patches, depth = dice.choice([0, 1, 36, 196, 10**6]), dice.choice([0, 1, 2, 3, 12, 999])
        share = ramp(dice.randint(0, 9), dice.randint(0, 20))
        counts = schedule.resolve(patches, depth, dice.random() < 0.5, dice.randint(0, 5), share)
        assert len(counts) == depth, "a count for every block"
        assert all(count >= 1 for count in counts) or not patches, "a token stays"
        trace(counts, patches)

    return attempt


def checkpoints(folder: Path) -> Callable[[random.Random], object]:
    """Weights and training states with flipped bits and cut ends; what is loaded in the end is what was saved."""
    spec = tiny.spec()
    model, other = tiny.model(spec), tiny.model(spec, seed=1)
    optimizer, target = create_optimizer(model, spec.recipe), create_optimizer(other, spec.recipe)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    place = save_checkpoint(folder, 7, model, optimizer, {"identity": {"spec": "x"}, "history": [], "scaler": {}})
    whole = {file.name: file.read_bytes() for file in place.iterdir()}
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def attempt(dice: random.Random) -> None:
        name = dice.choice(list(whole))
        content = damaged(whole[name], dice, 4000)
        if name == "state.json" and dice.random() < 0.5:
            content = json.dumps(changed(json.loads(whole[name]), dice)).encode()
        (place / name).write_bytes(content)
        try:
            match dice.randrange(3) if name == "model.safetensors" else 2:
                case 0:
                    load_initial(other, place / name)
                case 1:
                    load_weights(other, place / name)
                    assert all(torch.equal(saved[key], own) for key, own in other.state_dict().items()), "other values"
                case _:
                    load_checkpoint(place, other, target)
        finally:
            (place / name).write_bytes(whole[name])

    return attempt


def pictures(folder: Path) -> Callable[[random.Random], object]:
    """Photos in every format and mode that Pillow writes, with damaged bytes, through the reader of all tasks."""
    rng, files = np.random.default_rng(0), list[tuple[str, bytes]]()
    for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1", "I;16", "I", "F", "LA", "YCbCr"):
        shape = (40, 48, len(Image.new(mode, (1, 1)).getbands()))
        pixels = rng.integers(0, 255, shape, np.uint8)
        image = Image.fromarray(pixels[..., :3] if shape[2] >= 3 else np.repeat(pixels[..., :1], 3, 2)).convert(mode)
        for name, more in (("png", {}), ("jpeg", {"exif": exif()}), ("gif", {}), ("bmp", {}), ("tiff", {}), ("webp", {})):
            with suppress(OSError, ValueError, KeyError):
                image.save(buffer := io.BytesIO(), name, **more)
                files.append((name, buffer.getvalue()))

    def attempt(dice: random.Random) -> None:
        name, content = dice.choice(files)
        content = damaged(content, dice)
        (path := folder / f"image.{name}").write_bytes(mended(content) if dice.random() < 0.8 else content)
        image = decode(path)
        assert (image.mode, np.asarray(image).dtype) == ("RGB", np.uint8), "another form"

    return attempt


def exif() -> bytes:
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "camera"
    return tags.tobytes()


def maps(folder: Path) -> Callable[[random.Random], object]:
    """Maps of labels beside their images."""
    rng, contents = np.random.default_rng(0), list[bytes]()
    Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(folder / "image.png")
    labels = Image.fromarray(rng.integers(0, 8, (40, 48), np.uint8))
    for image in (labels, labels.convert("P"), labels.convert("1"), labels.convert("I;16"), labels.convert("RGB")):
        image.save(buffer := io.BytesIO(), "png")
        contents += [buffer.getvalue()] * (3 if image.mode in "LP" else 1)
    split = ade20k.Split(folder, "training", (folder / "image.png",), (folder / "map.png",))

    def attempt(dice: random.Random) -> None:
        content = damaged(dice.choice(contents), dice)
        (folder / "map.png").write_bytes(mended(content) if dice.random() < 0.8 else content)
        classes = dice.choice([7, 7, 3, 254])
        _, found = ade20k.read_pair(split, 0, classes)
        assert ((found < classes) | (found == ade20k.IGNORE)).all(), "a label that is no class"

    return attempt


def instances(folder: Path) -> Callable[[random.Random], object]:
    """COCO's annotation files: changed values and damaged bytes, then every mask of what was accepted."""
    tiny_coco.write_split(folder, "train", 6)
    path, content = folder / "annotations/instances_train2017.json", tiny_coco.load(folder, "train")
    (folder / "images").mkdir()

    def attempt(dice: random.Random) -> None:
        if dice.random() < 0.2:
            path.write_bytes(damaged(json.dumps(content).encode(), dice, 4000))
        else:
            path.write_text(json.dumps(changed(content, dice)))
        found, problems = annotations.read_annotations(path)
        if problems:
            raise ValueError(problems[0])
        split = coco.CocoSplit(folder, "train", found, found.images)
        for index, image in enumerate(found.images):
            if image.height * image.width < 1e7:
                coco.read_masks(split, index)

    return attempt


def results(folder: Path) -> Callable[[random.Random], object]:
    """Records and manifests of a finished scale, changed, through everything that notebooks read them with."""
    for name in ("imagenet_methods", "breakeven"):
        write_results(folder, name, seeds=1)
    files = {file: json.loads(file.read_text()) for file in sorted(folder.rglob("*.json"))}
    readers = [records.load_records, records.load_blocks, records.load_speed, records.not_run, records.setting]

    def attempt(dice: random.Random) -> None:
        file = dice.choice(list(files))
        whole = json.dumps(files[file]).encode()
        broken = damaged(whole, dice, 400) if dice.random() < 0.3 else json.dumps(changed(files[file], dice, 2)).encode()
        file.write_bytes(broken)
        try:
            for artefact, own in (("imagenet_methods", readers), ("breakeven", [records.load_cells, records.load_rounds])):
                for read in own:
                    read(artefact, folder)
            write_record(folder / "again.json", read_record(file))
        finally:
            file.write_bytes(whole)

    return attempt


FAMILIES: dict[str, tuple[Family, int]] = {
    "configuration": (configuration, 24), "methods": (methods, 2), "schedules": (schedules, 24), "checkpoints": (checkpoints, 10),
    "pictures": (pictures, 14), "maps": (maps, 8), "instances": (instances, 10), "results": (results, 8),
}  # fmt: skip
"""Family -> what makes it, and its share of all inputs in percent."""
OUTCOMES = ("not run", "success", "refused", "other error", "hang", "crash")


def run(inputs: int, seed: int, say: Callable[[str], None], only: str = "") -> int:
    """Try all families; says a line for each and for each finding. Returns the number of findings."""
    found = 0
    for name, (_, share) in FAMILIES.items():
        if name.startswith(only):
            count = inputs * share // 100
            counts = Counter(OUTCOMES[code] for code in _family(name, count, seed, say))
            say(f"| {name} | {count} | " + " | ".join(str(counts[outcome]) for outcome in OUTCOMES[1:]) + " |")
            found += count - counts["success"] - counts["refused"]
    return found


def _family(name: str, count: int, seed: int, say: Callable[[str], None]) -> bytes:
    """Outcome of each input. A child that dies, or that stands still in C code, is replaced."""
    done, fork = mmap.mmap(-1, count + 1), multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        while (start := done.find(b"\0")) < count:
            shutil.rmtree(folder)
            Path(folder).mkdir()
            child = fork.Process(target=_child, args=(name, Path(folder), start, count, seed, done))
            child.start()
            before = -1
            while child.is_alive() and before != (before := done.find(b"\0")):
                child.join(4 * SECONDS)
            if child.is_alive():
                child.kill()
                child.join()
            if child.exitcode > 0:
                raise RuntimeError(f"{name}: cannot be set up")
            if (place := done.find(b"\0")) < count:
                done[place] = OUTCOMES.index("crash" if child.exitcode != -signal.SIGKILL else "hang")
                say(f"{name} {place}: the process ended with status {child.exitcode}")
    return done[:count]


def _child(name: str, folder: Path, start: int, count: int, seed: int, done: mmap.mmap) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    signal.signal(signal.SIGALRM, _hang)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    attempt, seen = FAMILIES[name][0](folder), set[str]()
    for index in range(start, count):
        signal.alarm(SECONDS)
        try:
            attempt(random.Random(f"{seed}/{name}/{index}"))
            outcome = "success"
        except DECLARED as error:
            outcome = "refused" if str(error).strip() else "other error"
        except Hang:
            outcome = "hang"
        except BaseException as error:
            outcome = "other error"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            if key not in seen:
                seen.add(key)
                sys.stderr.write(f"{name} {index}: {key}: {str(error)[:200]}\n")
        finally:
            signal.alarm(0)
        done[index] = OUTCOMES.index(outcome)


def _hang(*_: object) -> None:
    raise Hang
