"""Jobs of every kind, killed at a random moment and started again: in the end there is what an undisturbed run leaves.

A job is forked from this process, which has imported the libraries: nothing is written while they are imported.
"""

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
from contextlib import suppress
from pathlib import Path
from typing import Any

import tiny
import tiny_coco
from project import ROOT, copy_repository
from synthetic import write_results
from tiny_detector import DETECTION

import cropr.__main__ as cropr
from cropr.data.layouts import write
from cropr.data.scenes import INCOMPLETE
from cropr.specs import ScenesSpec
from workflow.paper import page, run_notebook
from workflow.paper.grid import load_grid
from workflow.paper.microbench import __main__ as microbench

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIMES = {"provenance", "train_images_per_s", "step_ms"}
UNFINISHED = ("log.", ".lock", "checkpoint/", "best")
"""Files that a run writes while it trains."""
SHARES = {"data": 14, "bench": 5, "microbench": 5, "report page": 5, "notebook": 4, "snakemake": 3}
"""Percent of all kills; 16 for the other kinds."""
Job = tuple[Callable[[list[str]], Any], list[str], Path | None]
"""Function of a command line, its words with ``OUT`` for the folder of the results, what that folder begins with."""


def jobs(base: Path) -> dict[str, Job]:
    """Kinds of job by name; ``base`` gets what they read."""
    scenes = {"image_size": 32, "train": 48, "val": 12, "distractors": (0, 1)}
    dense = {"task": "segmentation", "data": {"image_size": 32, "num_classes": 11, "scenes": scenes}}
    write(ScenesSpec(**scenes), base / "maps", "ade20k")
    photos = tiny.write_folder(base / "photos")
    made: dict[str, Job] = {}
    for name, spec, data in (
        ("pretrain", tiny.spec(**dense, prune={"reducer": "none"}, recipe__epochs=4), base / "maps"),
        ("train classification", tiny.spec(recipe__epochs=4, model__drop_path=0.1), photos),
        ("train segmentation", tiny.spec(**dense, recipe__epochs=3, recipe__ema=0.9), base / "maps"),
        ("train detection", DETECTION, tiny_coco.write_coco(base / "coco", train=15, val=5)),
    ):
        words = ["train", "--spec", spec.model_dump_json(), "--data", str(data), "--evaluate-every", "2"]
        made[name] = cropr.main, [*words, "--out", "OUT"], None
    small, prune = {"model": tiny.spec().model.model_dump(), "image_size": 32}, tiny.spec().prune.model_dump()
    bench = json.dumps({**small, "prune": prune, "rounds": 3})
    sweep = json.dumps({**small, "batch_sizes": [1], "variants": {"cropr": prune}})
    words = ["data", "scenes", "--out", "OUT", "--train", "400", "--val", "100", "--layout", "coco"]
    made["data"] = cropr.main, words, None
    made["bench"] = cropr.main, ["bench", "--spec", bench, "--out", "OUT"], None
    made["microbench"] = microbench.main, ["sweep", "--spec", sweep, "--out", "OUT"], None
    words = ["notebooks/breakeven.ipynb", "--params", '{"results": "OUT"}', "--executed", "OUT/logs/run.ipynb"]
    words += ["--notebook", "OUT/notebook.ipynb", "--html", "OUT/page.html"]
    made["notebook"] = run_notebook.main, words, write_results(base / "notebook", "breakeven")
    results = [write_results(base / "page", name) for name in ("imagenet_methods", "ade20k")]
    made["report page"] = page.main, ["--results", "OUT", "--out", "OUT/report.html"], results[0]
    pretrain = next(run for run, spec in load_grid(ROOT / "config", "ci").pretrains.items() if spec.init == "random")
    words = ["-d", "OUT", "--cores", "1", "--config", "scale=ci", "pretrain=make", "--"]
    words += [f"results/ci/pretrain/{pretrain}/weights.safetensors"]
    made["snakemake"] = snakemake, words, copy_repository(base / "repository").path
    return made


def snakemake(words: list[str]) -> None:
    os.chdir(words[1])
    os.environ["PYTHONPATH"] = words[1]
    os.execv(sys.executable, [sys.executable, "-m", "snakemake", *words])


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
    except BaseException as stop:
        status = int(getattr(stop, "code", 1) or 0)
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int, seconds: float = 600) -> int | None:
    """Exit status, negative for a signal; None if the job still runs after so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def state(out: Path) -> dict[str, Any]:
    """What a job left, by name: contents; records without times; the number of lines of logs."""
    found: dict[str, Any] = {}
    for file in out.rglob("*"):
        if file.is_file() and not set(file.parts) & {"logs", ".snakemake", "__pycache__"} and file.suffix != ".tmp":
            content = file.read_bytes()
            record = file.name == "record.json"
            lines = content.count(b"\n") if file.name.startswith("log.") else content
            found[str(file.relative_to(out))] = timeless(json.loads(content)) if record else lines
    return found


def timeless(value: Any, measured: bool = False) -> Any:
    """Values without times; of a measurement, whose every number differs, the form alone."""
    if isinstance(value, dict):
        measured |= value.get("kind") in ("bench", "microbench")
        return {key: timeless(item, measured) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [timeless(item, measured) for item in value]
    return value if isinstance(value, str) or not measured else None


def disturbed(job: Job, out: Path, number: signal.Signals, moment: float, whole: dict[str, Any]) -> str:
    """Kill a job, look at what it left, run it to its end. What is wrong, or "survived", or "late": it had ended."""
    children = [start(job, out)]
    if wait(children[0], moment) is not None:
        return "late"
    (os.killpg if number == signal.SIGINT else os.kill)(children[0], number)  # Ctrl-C reaches the whole group
    wait(children[0])
    left = {} if job[0] is snakemake or (out / INCOMPLETE).exists() else state(out)
    if half := [name for name in left if not name.startswith(UNFINISHED) and whole.get(name) != left[name]]:
        return f"half-written: {half}"
    for pause in range(9):
        children.append(start(job, out))
        if not (status := wait(children[-1])):
            break
        if "--unlock" in out.with_suffix(".log").read_text():  # what Snakemake's message says
            wait(start((snakemake, ["-d", "OUT", "--unlock"], None), out))
        time.sleep(pause)
    for child in children:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    now = state(out)
    wrong = sorted(name for name in {*now, *whole} if now.get(name) != whole.get(name))
    return f"status {status}; differs: {wrong[:5]}" if status or wrong else "survived"


def prepare(job: Job, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    if job[2]:
        shutil.copytree(job[2], out)


def run(kills: int, seed: int, only: str = "") -> int:
    """Kill jobs; prints a line a kill and a table. Returns the number of failures."""
    dice, counts, whole, seconds = random.Random(seed), Counter[Any](), dict[str, Any](), dict[str, float]()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as base:
        kinds = {name: job for name, job in jobs(Path(base)).items() if name.startswith(only)}
        out = Path(base, "results/job")  # of all kinds, since notebooks name it
        for name, job in kinds.items():
            prepare(job, out)
            began = time.monotonic()
            assert wait(start(job, out)) == 0, f"{name} undisturbed: {out.with_suffix('.log').read_text()}"
            seconds[name], whole[name] = time.monotonic() - began, state(out)
        each = {name: round(kills * SHARES.get(name, 16) / 100) for name in kinds}
        todo = [(name, SIGNALS[count % 3]) for name in kinds for count in range(each[name])]
        dice.shuffle(todo)
        for name, one in todo:
            result = "late"
            while result == "late":
                prepare(kinds[name], out)
                moment = dice.uniform(0, seconds[name])
                result = disturbed(kinds[name], out, one, moment, whole[name])
            counts.update([(name, one, result == "survived"), name, *[(name, ".tmp") for _ in out.rglob(".*.tmp")]])
            print(f"{name}, {one.name} after {moment:.2f} of {seconds[name]:.2f} s: {result}", flush=True)
    print(f"| job | {' | '.join(one.name for one in SIGNALS)} | temporary files left |\n|---|---|---|---|---|")
    for name in kinds:
        cells = [f"{(ok := counts[name, one, True])}/{ok + counts[name, one, False]}" for one in SIGNALS]
        print(f"| {name} | {' | '.join(cells)} | {counts[name, '.tmp']} |")
    return sum(counts[name, one, False] for name in kinds for one in SIGNALS)
