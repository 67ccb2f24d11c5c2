"""Jobs of every kind, killed at a random moment and started again: in the end there is what an undisturbed run leaves.

A job is forked from this process, which has imported the libraries: nothing is written while they are imported.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import tiny_coco
from project import copy_repository
from synthetic import write_results
from test_detection_run import SPEC as DETECTION

import cropr.__main__ as cropr
from cropr.data.layouts import write
from cropr.data.scenes import INCOMPLETE
from cropr.specs import ScenesSpec
from workflow.paper import page, run_notebook
from workflow.paper.grid import load_grid
from workflow.paper.microbench import __main__ as microbench

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIMES = {"provenance", "train_images_per_s", "step_ms", "data_ms", "images_per_s"}
LEFT_OUT = {"logs", ".snakemake", "__pycache__"}
RERUNS = 9
SHARES = {"data": 14, "bench": 5, "microbench": 5, "report page": 5, "notebook": 4, "snakemake": 3}
"""Percent of all kills; 16 for the other kinds."""
Job = tuple[Callable[[list[str]], Any], list[str]]
"""A function of the command line and its arguments, in which ``OUT`` is the folder of the results."""


def jobs(base: Path) -> dict[str, tuple[Job, Path | None]]:
    """Kind of job -> job, and what its folder begins with. ``base`` gets what they read."""
    scenes = {"image_size": 32, "train": 48, "val": 12, "distractors": (0, 1)}
    photos, coco = tiny.write_folder(base / "photos"), tiny_coco.write_coco(base / "coco", train=15, val=5)
    write(ScenesSpec(**scenes), base / "maps", "ade20k")
    write_results(base / "notebook", "breakeven")
    for name in ("imagenet_methods", "ade20k"):
        write_results(base / "page", name)
    repository = copy_repository(base / "repository").path
    dense = {"task": "segmentation", "data": {"image_size": 32, "num_classes": 11, "scenes": scenes}}
    plain = {"reducer": "none", "schedule": {"constant": {"rate": 0}}, "fusion": "none"}
    train = {
        "pretrain": (tiny.spec(**dense, prune=plain, recipe__epochs=4), base / "maps"),
        "train classification": (tiny.spec(recipe__epochs=4, model__drop_path=0.1), photos),
        "train segmentation": (tiny.spec(**dense, recipe__epochs=3, recipe__ema=0.9), base / "maps"),
        "train detection": (DETECTION, coco),
    }
    made: dict[str, tuple[Job, Path | None]] = {}
    for name, (spec, data) in train.items():
        arguments = ["train", "--spec", spec.model_dump_json(), "--data", str(data), "--evaluate-every", "2"]
        made[name] = (cropr.main, [*arguments, "--out", "OUT"]), None
    measured = {"model": tiny.spec().model.model_dump(), "image_size": 32}
    bench = json.dumps({**measured, "prune": tiny.spec().prune.model_dump(), "rounds": 3})
    sweep = json.dumps({**measured, "batch_sizes": [1], "variants": {"cropr": tiny.spec().prune.model_dump()}})
    notebook = ["notebooks/breakeven.ipynb", "--params", '{"results": "OUT"}', "--executed", "OUT/logs/run.ipynb"]
    made["data"] = (cropr.main, "data scenes --out OUT --train 400 --val 100 --layout coco".split()), None
    made["bench"] = (cropr.main, ["bench", "--spec", bench, "--out", "OUT"]), None
    made["microbench"] = (microbench.main, ["sweep", "--spec", sweep, "--out", "OUT"]), None
    published = ["--notebook", "OUT/notebook.ipynb", "--html", "OUT/page.html"]
    made["notebook"] = (run_notebook.main, [*notebook, *published]), base / "notebook"
    made["report page"] = (page.main, ["--results", "OUT", "--out", "OUT/report.html"]), base / "page"
    pretrain = next(run for run, spec in load_grid(ROOT / "config", "ci").pretrains.items() if spec.init == "random")
    target = ["scale=ci", "pretrain=make", "--", f"results/ci/pretrain/{pretrain}/weights.safetensors"]
    made["snakemake"] = (snakemake, ["-d", "OUT", "--cores", "1", "--config", *target]), repository
    return made


def snakemake(arguments: list[str]) -> None:
    os.chdir(arguments[1])
    os.environ["PYTHONPATH"] = arguments[1]
    os.execv(sys.executable, [sys.executable, "-m", "snakemake", *arguments])


def start(job: Job, out: Path) -> int:
    """Fork a job in a session of its own; its output goes to a file beside ``out``."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        os.chdir(ROOT)
        for stream in (1, 2):
            os.dup2(os.open(out.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
        status = job[0]([word.replace("OUT", str(out)) for word in job[1]]) or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int, seconds: float = 300) -> int | None:
    """Exit status, negative for a signal; None if the job still runs after so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def state(out: Path) -> dict[str, Any]:
    """What a job left, without times: files by name, records and logs by what they hold."""
    found: dict[str, Any] = {}
    for file in out.rglob("*"):
        if file.is_file() and not set(file.parts) & LEFT_OUT and file.suffix != ".tmp":
            name, content = str(file.relative_to(out)), file.read_bytes()
            if file.name == "record.json":
                content = timeless(json.loads(content))
            elif file.name.startswith("log."):
                content = content.count(b"\n")
            found[name] = content
    return found


def timeless(value: Any, measured: bool = False) -> Any:
    """Values without times; of a measurement, whose every number differs, the form alone."""
    if isinstance(value, dict):
        measured |= value.get("kind") in ("bench", "microbench")
        return {key: timeless(item, measured) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [timeless(item, measured) for item in value]
    return value if isinstance(value, str) or not measured else None


def disturbed(job: Job, out: Path, number: signal.Signals, moment: float, whole: dict[str, Any]) -> str | None:
    """Kill a job, look at what it left, run it to its end. What is wrong; None for nothing; "late" if it had ended."""
    children = [start(job, out)]
    if wait(children[0], moment) is not None:
        return "late"
    (os.killpg if number == signal.SIGINT else os.kill)(children[0], number)
    wait(children[0])
    if job[0] is not snakemake and not (out / INCOMPLETE).exists():
        for name, content in state(out).items():
            final = not name.startswith(("log.", ".lock", "checkpoint/", "best"))
            if final and whole.get(name) != content:
                return f"{name} is half-written under its name"
    for attempt in range(RERUNS):
        children.append(start(job, out))
        if not (status := wait(children[-1])):
            break
        if "--unlock" in out.with_suffix(".log").read_text():  # what its message says
            wait(start((snakemake, ["-d", "OUT", "--unlock"]), out))
        time.sleep(attempt)
    for child in children:
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    if status != 0:
        return f"does not end, status {status}: {out.with_suffix('.log').read_text()[-600:]}"
    now = state(out)
    wrong = sorted(name for name in {*now, *whole} if now.get(name) != whole.get(name))
    return f"differs from an undisturbed run: {', '.join(wrong[:5])}" if wrong else None


def prepare(out: Path, source: Path | None) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    if source:
        shutil.copytree(source, out)


def run(kills: int, seed: int, say: Callable[[str], None], only: str = "") -> int:
    """Kill jobs in turn; says a table in the end. Returns the number of failures."""
    dice, survived, injected, strays = random.Random(seed), Counter(), Counter(), Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        base, whole, seconds = Path(folder), {}, {}
        kinds = {name: made for name, made in jobs(base).items() if name.startswith(only)}
        out = base / "results" / "job"  # of all, since notebooks name it
        for name, (job, source) in kinds.items():
            prepare(out, source)
            began = time.monotonic()
            if wait(start(job, out)):
                raise RuntimeError(f"{name} fails undisturbed: {out.with_suffix('.log').read_text()[-3000:]}")
            seconds[name], whole[name] = time.monotonic() - began, state(out)
            say(f"{name}: {seconds[name]:.1f} s undisturbed, {len(whole[name])} files")
        each = {name: round(kills * SHARES.get(name, 16) / 100) for name in kinds}
        todo = [(name, SIGNALS[count % len(SIGNALS)]) for name in kinds for count in range(each[name])]
        dice.shuffle(todo)
        for number, (name, one) in enumerate(todo, start=1):
            job, source = kinds[name]
            wrong: str | None = "late"
            while wrong == "late":
                prepare(out, source)
                moment = dice.uniform(0, seconds[name])
                wrong = disturbed(job, out, one, moment, whole[name])
            injected[name, one] += 1
            survived[name, one] += wrong is None
            strays[name] += len([*out.rglob(".*.tmp")])
            say(f"{number} {name} {one.name} after {moment:.2f} s: {wrong or 'survived'}")
    say(f"| job | {' | '.join(one.name for one in SIGNALS)} | temporary files left |\n|---|---|---|---|---|")
    for name in kinds:
        counts = " | ".join(f"{survived[name, one]}/{injected[name, one]}" for one in SIGNALS)
        say(f"| {name} | {counts} | {strays[name]} |")
    return injected.total() - survived.total()
