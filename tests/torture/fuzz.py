"""Broken input for everything that reads a user's files or values: success, or an error that the command line reports.

An input is a function of (seed, family, index). A crash of the process that tries them is counted; the next follows.
"""

import copy
import io
import json
import logging
import math
import mmap
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import tiny_coco
import torch
import yaml
from PIL import Image
from project import ROOT
from synthetic import write_results
from tiny_detector import DETECTION

from cropr.bench.specs import BenchSpec, PlanSpec
from cropr.cli.spec_flags import read_values
from cropr.data import ade20k, annotations, coco, loading
from cropr.pruning.methods import REDUCERS
from cropr.pruning.schedule import Schedule, ramp
from cropr.specs import PruneSpec, ScenesSpec, check
from cropr.tasks import base
from cropr.training import checkpoint, optim
from workflow.paper import configuration as scales
from workflow.paper import microbench, records

SECONDS = 5
"""Of the processor; an input that takes longer hangs."""
NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 10**30, 10**400, 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf, "",
    "x", "1", "nan", "none", "cropr", "llf", "\ud800", "é" * 300, [], [1], [None], ["x", "x"], [math.nan] * 2, {},
    {"a": 1}, {"at": {"1": 4}}, {"constant": {"rate": 3}}, {"stages": {"at": {"1": 4, "x": 2}}}, [[[]]], {"": {}},
]  # fmt: skip
Dice = random.Random
Attempt = Callable[[Dice], object]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container below a value with every key or index of it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def changed(value: Any, dice: Dice, most: int = 3) -> Any:
    """A copy with up to ``most`` changes: a value replaced, scaled or removed, or an unknown key added."""
    value = copy.deepcopy(value)
    for _ in range(dice.randint(1, most)):
        container, key = dice.choice(places(value) or [([value], 0)])
        match dice.randrange(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[dice.choice(["x", "", "seed", str(key) * 2])] = copy.deepcopy(dice.choice(NASTY))
            case 2 if isinstance(container[key], int | float):
                container[key] = dice.choice([-1, 10, 1e9, 1e300]) * min(container[key], 1e6)
            case _:
                container[key] = copy.deepcopy(dice.choice(NASTY))
    return value


def damaged(content: bytes, dice: Dice, head: int = 64) -> bytes:
    """Bytes with a cut, flipped bits, or some removed, repeated or set; half of all places are in the head. A PNG file
    mostly gets the checksums that its chunks should have, so that damage reaches the decoder."""
    data = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 8])):
        place = dice.randrange(max(1, min(len(data), dice.choice([head, len(data)]))))
        twice, most = data[place : place + dice.randint(1, 64)] * 2, b"\x7f\xff\xff\xff"
        piece = dice.choice([b"", twice, b"\xff" * 4, b"\0" * 4, most, b"\0\0\x40\0"])
        match dice.randrange(6):
            case 0:
                del data[place:]
            case 1 | 2:
                data[place : place + dice.randint(1, 8)] = piece
            case _:
                data[place : place + 1] = bytes(byte ^ 1 << dice.randrange(8) for byte in data[place : place + 1])
    place = 8 if data[1:4] == b"PNG" and dice.random() < 0.8 else len(data)
    while place + 12 <= len(data) and (end := place + 8 + int.from_bytes(data[place : place + 4])) + 4 <= len(data):
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4)
        place = end + 4
    return bytes(data)


def configuration(folder: Path) -> Attempt:
    """Specifications of every kind, and the workflow's YAML; of what is accepted as pruning, a tiny model is built."""
    compared = {"model": {"name": "vit", "args": {"depth": 4}}, "image_size": 64}
    pruned = BenchSpec.model_validate({**compared, "prune": tiny.spec().prune.model_dump()})
    valid: list[tuple[Any, Any]] = [
        *((type(spec), spec.model_dump(mode="json")) for spec in (tiny.spec(), DETECTION, pruned)),
        *((kind, kind(measure=name).model_dump(mode="json")) for name, kind in microbench.MEASURES.items()),
        (PlanSpec, {**compared, "prune": {"reducer": "cropr"}, "targets": [1.5, 2]}),
        (ScenesSpec, {"objects": [1, 2]}),
    ]
    for kind, place in ((scales.ScaleConfig, "scales"), (scales.ArtefactConfig, "experiments")):
        valid += [(kind, yaml.safe_load(file.read_text())) for file in sorted((ROOT / "config" / place).glob("*.yaml"))]
    for name, method in REDUCERS.items():
        options = dict.fromkeys(method.options, 1)
        valid.append((PruneSpec, {"reducer": name, "schedule": {"constant": {"rate": 2}}, "options": options}))

    def attempt(dice: Dice) -> None:
        kind, values = dice.choice(valid)
        values = changed(values, dice)
        if dice.random() < 0.3:  # as a file, which may be damaged
            text = (json.dumps if dice.random() < 0.5 else yaml.safe_dump)(values).encode()
            (folder / "spec.yaml").write_bytes(damaged(text, dice, 200) if dice.random() < 0.5 else text)
            values = read_values(str(folder / "spec.yaml"))
        spec = check(kind, values, "spec")
        if kind is PruneSpec:
            base.build_model(tiny.spec().model, spec, 3, 32)

    return attempt


def schedules(_: Path) -> Attempt:
    """Constructors, configurations, and their resolution against models of several sizes."""

    def number(dice: Dice) -> Any:
        return dice.choice(NASTY) if dice.random() < 0.1 else dice.choice([dice.randint(0, 40), dice.random()])

    def attempt(dice: Dice) -> None:
        rule = dice.choice(["constant", "stages", "fraction", "kept", "squares"])
        at = {str(dice.randint(1, 12)): number(dice) for _ in range(dice.randint(0, 3))}
        what, align = number(dice) if rule == "constant" else at, dice.choice([1, 8, number(dice)])
        if dice.random() < 0.5:
            schedule = getattr(Schedule, rule)(what, **({} if rule == "squares" else {"align": align}))
        else:
            config = {rule: {"rate" if rule == "constant" else "at": what, "align": align}}
            schedule = Schedule.from_config(changed(config, dice) if dice.random() < 0.5 else config)
        assert Schedule.from_config(json.loads(json.dumps(schedule.to_config()))) == schedule, "not what was written"
        schedule.describe(), schedule.sites(12)
        patches, depth = dice.choice([0, 1, 36, 196, 196, 10**6]), dice.choice([0, 1, 2, 3, 12, 13, 999])
        share = ramp(dice.randint(0, 9), dice.randint(0, 20))
        counts = schedule.resolve(patches, depth, dice.random() < 0.5, dice.randint(0, 5), share)
        assert len(counts) == depth, "a count for every block"
        assert min(counts) >= 1, "a token stays"

    return attempt


def checkpoints(folder: Path) -> Attempt:
    """Weights and training states with flipped bits and cut ends; what is loaded in the end is what was saved."""
    spec = tiny.spec()
    model, other = tiny.model(spec), tiny.model(spec, seed=1)
    optimizer, target = optim.create_optimizer(model, spec.recipe), optim.create_optimizer(other, spec.recipe)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state: dict[str, Any] = {"identity": {"spec": "x"}, "history": [], "scaler": {}}
    place = checkpoint.save_checkpoint(folder, 7, model, optimizer, state)
    whole = {file.name: file.read_bytes() for file in place.iterdir()}
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def attempt(dice: Dice) -> None:
        name = dice.choice(list(whole))
        content = damaged(whole[name], dice, 4000)
        (place / name).write_bytes(content)
        try:
            if name == "model.safetensors" and dice.random() < 0.5:
                checkpoint.load_initial(other, place / name)
                checkpoint.load_weights(other, place / name)
                equal = all(torch.equal(saved[key], own) for key, own in other.state_dict().items())
                assert equal or b'"sha256"' not in content, "other values"
            checkpoint.load_checkpoint(place, other, target)
        finally:
            (place / name).write_bytes(whole[name])

    return attempt


def images(folder: Path) -> Attempt:
    """Pictures in every format and mode that Pillow writes, as photos and as maps of labels."""
    files, tags = list[tuple[str, bytes]](), Image.Exif()
    tags[0x0112] = 6
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8))
    for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1", "I;16", "I", "F", "LA", "YCbCr"):
        for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp"):
            with suppress(OSError, ValueError, KeyError):  # a mode that the format lacks
                photo.convert(mode).save(buffer := io.BytesIO(), kind, **({"exif": tags} if kind == "jpeg" else {}))
                files.append((kind, buffer.getvalue()))

    def attempt(dice: Dice) -> None:
        kind, content = dice.choice(files)
        (path := folder / f"image.{kind}").write_bytes(damaged(content, dice))
        if dice.random() < 0.7:
            assert loading.decode(path).mode == "RGB"
        else:
            assert np.isin(ade20k.decode_map(path, classes := dice.choice([7, 254])), [*range(classes), 255]).all()

    return attempt


def instances(folder: Path) -> Attempt:
    """COCO's annotation files: changed values and damaged bytes, then every mask of what was accepted."""
    path = tiny_coco.save(tiny_coco.write_coco(folder), "train", tiny_coco.load(folder, "train"))
    content = tiny_coco.load(folder, "train")

    def attempt(dice: Dice) -> None:
        text = json.dumps(changed(content, dice, 1) if dice.random() < 0.8 else content).encode()
        path.write_bytes(text if dice.random() < 0.8 else damaged(text, dice, 4000))
        found, problems = annotations.read_annotations(path)
        if problems:
            raise ValueError(problems[0])
        split = coco.CocoSplit(folder, "train", found, found.images)
        for index, image in enumerate(found.images):
            if image.height * image.width < 1e7:
                coco.read_masks(split, index)

    return attempt


def results(folder: Path) -> Attempt:
    """Records and manifests of a finished scale, changed, through what notebooks read them with."""
    reads: dict[str, list[Any]] = {
        "breakeven": [records.load_cells, records.load_rounds],
        "imagenet_methods": [records.load_records, records.load_blocks, records.load_speed, records.setting],
    }
    for name in reads:
        write_results(folder, name, seeds=1)
    files = {file: file.read_bytes() for file in sorted(folder.rglob("*.json"))}

    def attempt(dice: Dice) -> None:
        file = dice.choice(list(files))
        broken = json.dumps(changed(json.loads(files[file]), dice, 2)).encode()
        file.write_bytes(damaged(files[file], dice, 400) if dice.random() < 0.3 else broken)
        try:
            name = dice.choice(list(reads))
            dice.choice(reads[name])(name, folder)
        finally:
            file.write_bytes(files[file])

    return attempt


SHARES = {configuration: 30, schedules: 25, checkpoints: 10, images: 20, instances: 10, results: 5}
"""Family -> percent of all inputs."""
OUTCOMES = ("not run", "success", "refused", "other error", "hang", "crash")


def run(inputs: int, seed: int, only: str = "") -> int:
    """Try all families; prints a line for each and for each kind of finding. Returns the number of findings."""
    found = 0
    print(f"| family | inputs | {' | '.join(OUTCOMES[1:])} |\n|---|---|---|---|---|---|---|")
    for family, share in SHARES.items():
        count = inputs * share // 100 if family.__name__.startswith(only) else 0
        done = mmap.mmap(-1, count + 1)  # an outcome each, shared with the process that tries them
        while (place := done.find(b"\0")) < count:
            if child := os.fork():
                os.waitpid(child, 0)
                if (crashed := done.find(b"\0")) < count:
                    done[crashed] = OUTCOMES.index("crash")
                    print(f"{family.__name__} {crashed}: the process crashed", flush=True)
                continue
            try:
                _try(family, range(place, count), seed, done)
            finally:
                os._exit(0)
        outcomes = Counter(OUTCOMES[code] for code in done[:count])
        cells = " | ".join(str(outcomes[name]) for name in OUTCOMES[1:])
        print(f"| {family.__name__} | {count} | {cells} |", flush=True)
        found += count - outcomes["success"] - outcomes["refused"]
    return found


class Hang(BaseException):
    """An input took too long. No handler of the library catches it."""


def hang(*_: object) -> None:
    raise Hang


def _try(family: Callable[[Path], Attempt], places: range, seed: int, done: mmap.mmap) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    signal.signal(signal.SIGPROF, hang)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    folder, seen = Path(tempfile.mkdtemp()), set[str]()
    attempt = family(folder)
    for place in places:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            attempt(random.Random(f"{seed}/{family.__name__}/{place}"))
            outcome = "success"
        except (ValueError, OSError):
            outcome = "refused"
        except BaseException as error:
            outcome = "hang" if isinstance(error, Hang) else "other error"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            if (key := f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}") not in seen:
                print(f"{family.__name__} {place}: {key}: {str(error)[:200]}", flush=True)
            seen.add(key)
        signal.setitimer(signal.ITIMER_PROF, 0)
        done[place] = OUTCOMES.index(outcome)
    shutil.rmtree(folder)
