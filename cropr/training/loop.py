"""A training run from spec to record, and its loop: a line of JSON a step, checkpoints, resuming.

All randomness of a step is a function of (seed, step, process), and all that a step changes is in the checkpoint: a run
that was killed and resumed ends with the weights of an undisturbed one, bit for bit on the CPU.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from timm.utils import ModelEmaV3
from torch import nn

import cropr.training.checkpoint as store
import cropr.training.optim as optim
from cropr.data.loading import TrainBatches, some
from cropr.distributed import StopRequest, World
from cropr.records import RECORD, code_origin, make_record, read_record, write_record, write_table, write_text
from cropr.specs import RecipeSpec
from cropr.tasks import TrainSpec, open_task
from cropr.tasks.base import BatchTask, EvaluationSettings, differences, write_arrays

CHECKPOINTS = "checkpoint"
LOG, TABLE, EVENTS = "log.jsonl", "log.csv", "tensorboard"
PER_IMAGE = "per_image.npz"
OVERFLOWS = 30
"""fp16: steps in a row without finite gradients before the run counts as diverged; each halves the loss scale."""
LOG_SECONDS = 30
"""Between two log lines where there is no terminal."""
HELD_BACK = 0.25  # share of the time that waiting for images may take before the log says so

_LOG = logging.getLogger(__name__)


class TrainingDiverged(ValueError):
    """The loss or its gradient is not finite any more."""


class TrainingInterrupted(Exception):
    """A signal asked for an end; a checkpoint was written. ``args`` are message and signal number."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What does not change the result."""

    out: Path
    identity: dict[str, Any] = field(default_factory=dict)
    """What a checkpoint must agree with to be resumed, for example spec and data fingerprint."""
    checkpoint_minutes: float = 10
    """Time between checkpoints within an epoch; there is one at the end of each epoch in any case."""
    evaluate_every: int = 0
    """Epochs; 0 for never."""
    tensorboard: bool = False
    """Whether event files are written, too."""


def train(
    spec: TrainSpec,
    seed: int,
    data_root: Path,
    out: Path,
    *,
    world: World,
    init: Path | None = None,
    teacher: Path | None = None,
    workers: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Run ``spec`` and return its record; at once if ``out`` has it already, from its checkpoint if it was cut off.

    ``data_root`` has the images in the layout of the task; ``workers`` processes decode them for each that trains. If
    ``spec.init`` is a digest, ``init`` is the weights: a file, or the directory of a run. So is ``teacher``.
    ``settings`` are those of ``Settings``. Raises ValueError or FileNotFoundError for spec, data, weights or ``out``
    that do not fit, and what ``fit`` raises.
    """
    if (record := finished(out, spec, seed)) is not None:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # of a run that was killed after it wrote its record
        return record
    code_origin()  # now, since the code may change before the record is written
    started, recipe, task = time.time(), spec.recipe, open_task(spec, data_root)
    torch.manual_seed(seed)
    model, origin = store.initial_model(task, init, resuming=store.latest_checkpoint(out / CHECKPOINTS) is not None)
    model.to(world.device)
    store.load_teacher(task, teacher, world.device)
    size = max(1, recipe.batch_size // (recipe.accumulate * world.size))
    how = EvaluationSettings(world=world, workers=workers, batch_size=size, precision=recipe.precision, seed=seed)
    identity = {"spec": spec.digest(), "data": task.fingerprint, "init": origin}
    how_run, batches = Settings(out, identity, **settings), task.batches(seed, world, workers)
    history = fit(model, task, batches, recipe, seed, how_run, world, lambda own: task.evaluate(own, how).metrics)
    result = task.evaluate(model, how)
    found = {
        "seed": seed,
        "metrics": {**result.metrics, **store.parameters(model), **store.multiply_adds(model)},
        "tokens": list(model.token_trace),
        "series": {**result.series, "epochs": history},
        "per_image": PER_IMAGE,
        **({"classes": list(task.classes)} if task.classes else {}),
    }
    where = {"device": str(world.device), "precision": recipe.precision, "data_fingerprint": task.fingerprint}
    record = make_record("train", spec, started, found, **where, processes=world.size, workers=workers)
    if world.leads:
        record["metrics"] |= summarise(out / LOG) if recipe.epochs else {}
        write_arrays(out / PER_IMAGE, result.images)
        store.save_weights(out / store.WEIGHTS, model, spec.digest())
        write_record(out / RECORD, record)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=not recipe.epochs)
    world.wait()
    return record


def finished(out: Path, spec: TrainSpec, seed: int) -> dict[str, Any] | None:
    """The record in ``out`` if the run is complete, its weights included; None if it has yet to run. Raises ValueError:
    ``out`` holds another run; the settings that differ are named."""
    if not (out / RECORD).exists() or not (out / store.WEIGHTS).exists():
        return None
    record = read_record(out)
    if not (out / record.get("per_image", RECORD)).exists():
        return None
    mine = {"seed": seed, "spec": spec.model_dump(mode="json")}
    theirs = {"seed": record.get("seed"), "spec": record.get("spec")}
    if mine != theirs:
        changes = some(differences(theirs, mine), limit=5)
        raise ValueError(f"{out} holds the record of another run: {changes}. Choose another --out, or delete it")
    return record


def fit(
    model: nn.Module,
    task: BatchTask,
    loader: TrainBatches,
    recipe: RecipeSpec,
    seed: int,
    settings: Settings,
    world: World | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Train ``model``, on ``world``'s device, in place, from the last checkpoint in ``settings.out`` if there is one.

    Where the recipe averages weights, the average is evaluated, and the model has it in the end. Returns what
    ``evaluate`` returned, with ``epoch`` (from 1), including evaluations before a resumption. Raises TrainingDiverged;
    TrainingInterrupted: after SIGTERM or SIGINT; ValueError: recipe that cannot run here, or checkpoint of another run.
    """
    world = world or World()
    if recipe.precision == "fp16" and world.device.type == "cpu":
        raise ValueError("recipe.precision = fp16: the CPU computes in fp32 or bf16; choose one of these")
    if not recipe.epochs:
        return []
    run = _Run(model, task, loader, recipe, seed, settings, world)

    def due() -> int:  # epoch that is to be evaluated now; 0 for none
        epoch, begun = divmod(run.step, len(loader))
        wanted = evaluate and settings.evaluate_every and not begun and epoch % settings.evaluate_every == 0
        return epoch if wanted and all(entry["epoch"] != epoch for entry in run.history) else 0

    with run.log, StopRequest() as stop, Progress(run.total, run.step, len(loader), run.world.leads) as progress:
        while run.step < run.total or due():
            try:
                if not due():  # else a signal came at the end of an epoch, before its evaluation
                    run.train_epoch(stop, progress)
            except (RuntimeError, OSError, EOFError) as error:
                # A signal to the whole process group ends the workers of the loader, too, and that surfaces here.
                if stop.requested is None:
                    raise
                raise TrainingInterrupted(f"stopped by {stop.name}; {run.last_checkpoint}", stop.requested) from error
            if evaluate and (epoch := due()):
                own = run.average.module if run.average else model
                run.evaluated(epoch, own, evaluate(own))
            run.save()
    if run.average:
        model.load_state_dict(run.average.module.state_dict())
    return run.history


class _Run:
    """Everything that advances in training, and how it is saved and restored; arguments as of ``fit``."""

    def __init__(
        self, model: Any, task: Any, loader: TrainBatches, recipe: RecipeSpec, seed: int, how: Settings, world: World
    ) -> None:
        self.model, self.loader, self.recipe, self.seed = model, loader, recipe, seed
        self.settings, self.world = how, world
        if recipe.grad_checkpointing:
            model.backbone.host.set_grad_checkpointing()
        if recipe.freeze_encoder:
            optim.freeze_encoder(model)
        self.root = how.out / CHECKPOINTS
        self.average = None if recipe.ema is None else ModelEmaV3(model, decay=recipe.ema)
        self.optimizer = optim.create_optimizer(model, recipe)
        self.schedule = optim.create_schedule(self.optimizer, recipe, len(loader))
        self.total = optim.total_steps(recipe, len(loader))
        self.stepper = optim.Stepper(model, task, self.optimizer, recipe, world)
        self.identity = {**how.identity, "seed": seed, "steps_per_epoch": len(loader)}
        self.step, self.history = 0, list[dict[str, float]]()
        if (checkpoint := store.latest_checkpoint(self.root)) is not None:
            self._resume(checkpoint)
        self.log = open_log(how.out / LOG if world.leads else Path(os.devnull), self.step)
        self.events: Any = None
        if how.tensorboard and world.leads:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(how.out / EVENTS), purge_step=self.step)
        self._saved = time.monotonic()

    def train_epoch(self, stop: StopRequest, progress: "Progress") -> None:
        """The rest of the current epoch, or of the run; a line of the log a step."""
        self.model.train()
        epoch, first = divmod(self.step, len(self.loader))
        clock = time.perf_counter()
        for images, targets in islice(self.loader.epoch(epoch, first), self.total - self.step):
            loaded = time.perf_counter()
            self.schedule.step_update(self.step)
            self.model.ramp(optim.pruning_share(self.recipe, self.step, len(self.loader)))
            optim.seed_step(self.seed, self.step, self.world.rank)
            result = self.stepper(images, targets, lambda: stop.requested is not None)
            if self.average:
                self.average.update(self.model)
            seconds = loaded - clock, time.perf_counter() - loaded
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            self.log.write(json.dumps(line := _line(self.step, epoch, lr, result, seconds)) + "\n")
            self._show("train", line)
            progress.step(line)
            self._require_finite(result, epoch, lr)
            self.step += 1
            if result.stop:
                self.save()
                raise TrainingInterrupted(f"stopped by {stop.name}; {self.last_checkpoint}", stop.requested)
            if self.step % len(self.loader) and time.monotonic() - self._saved > 60 * self.settings.checkpoint_minutes:
                self.save()
            clock = time.perf_counter()

    def save(self) -> None:
        self._saved = time.monotonic()
        if self.world.leads:
            os.fsync(self.log.fileno())  # a checkpoint is never ahead of its log
            write_table(self.settings.out / TABLE, _lines(self.settings.out / LOG))
            if self.events:
                self.events.flush()
            scaler = self.stepper.scaler.state_dict()
            state = {"identity": self.identity, "history": self.history, "scaler": scaler}
            average = self.average.module if self.average else None
            store.save_checkpoint(self.root, self.step, self.model, self.optimizer, state, average)

    def evaluated(self, epoch: int, model: nn.Module, metrics: dict[str, float]) -> None:
        """Keep metrics, and the weights of the model if its first metric is the highest so far."""
        name, value = next(iter(metrics.items()))
        self._show("val", metrics)
        _LOG.info("epoch %d: validation %s %s", epoch, name, "none" if value is None else f"{value:.2f} %")
        if self.world.leads and all((value or 0) > (earlier[name] or 0) for earlier in self.history):
            store.save_weights(self.settings.out / store.BEST, model)
        self.history.append({"epoch": epoch, **metrics})

    def _show(self, what: str, values: dict[str, Any]) -> None:
        for name, value in values.items() if self.events else ():
            self.events.add_scalar(f"{what}/{name}", math.nan if value is None else value, self.step)

    @property
    def last_checkpoint(self) -> str:
        return f"last checkpoint: {store.latest_checkpoint(self.root) or 'none yet'}"

    def _resume(self, checkpoint: Path) -> None:
        theirs = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["identity"]
        if changes := differences(theirs, self.identity):
            raise ValueError(f"{checkpoint} is another run's: {'; '.join(changes)}. Choose another --out, or delete it")
        average = self.average.module if self.average else None
        state = store.load_checkpoint(checkpoint, self.model, self.optimizer, average)
        if self.stepper.scaler.is_enabled():
            self.stepper.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        _LOG.info("resumed from %s, %d steps done", checkpoint, self.step)

    def _require_finite(self, result: optim.StepResult, epoch: int, lr: float) -> None:
        """An overflow of fp16 is normal once in a while: the step was skipped and the loss scale halved."""
        overflown = self.stepper.overflows > (OVERFLOWS if self.stepper.scaler.is_enabled() else 0)
        numbers = {"loss": result.loss, "auxiliary loss": result.aux_loss or 0}
        numbers |= {"gradient norm": result.grad_norm} if overflown else {}
        if wrong := [f"the {name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]:
            place = f"at step {self.step} (epoch {epoch + 1}), learning rate {lr:.3g}; {self.last_checkpoint}"
            fix = "Lower recipe.base_lr, lengthen recipe.warmup_epochs or set recipe.clip_grad"
            raise TrainingDiverged(f"{wrong[0]} {place}. {fix}")


def summarise(log: Path) -> dict[str, float]:
    """``images``, ``train_images_per_s`` and ``step_ms`` (median, without loading) of a run, from its log. The first
    five steps, in which memory and kernels are set up, are left out of the median."""
    lines = _lines(log)
    steady = [line["step_ms"] for line in lines[5:]] or [line["step_ms"] for line in lines]
    images = sum(line["images"] for line in lines)
    seconds = sum(line["data_ms"] + line["step_ms"] for line in lines) / 1000
    return {"images": images, "train_images_per_s": images / seconds, "step_ms": float(np.median(steady))}


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _line(step: int, epoch: int, lr: float, result: optim.StepResult, seconds: tuple[float, float]) -> dict[str, Any]:
    """A line of the log. Numbers that are not finite become null, which JSON has."""
    numbers = {key: getattr(result, key) for key in ("loss", "aux_loss", "grad_norm")}
    finite = {key: value if value is not None and math.isfinite(value) else None for key, value in numbers.items()}
    speed = {"images": result.images, "images_per_s": round(result.images / sum(seconds), 2)}
    speed |= {key: round(1000 * value, 3) for key, value in zip(("data_ms", "step_ms"), seconds, strict=True)}
    return {"step": step, "epoch": epoch, "lr": lr, **finite, **speed}


def open_log(path: Path, step: int) -> TextIO:
    """The log of a run in which ``step`` steps are done; lines of later ones, which a killed run left, are dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():  # a process that does not lead writes to the null device
        kept = path.read_text(encoding="utf-8").splitlines()[:step]
        write_text(path, "".join(f"{line}\n" for line in kept))
    return path.open("a", buffering=1, encoding="utf-8")


class Progress(Bar):
    """A bar on a terminal, else a log line every 30 s and at the end of each epoch; nothing without ``show``."""

    def __init__(self, total: int, done: int, steps_per_epoch: int, show: bool = True) -> None:
        self._total, self._done, self._steps = total, done, steps_per_epoch
        self._began = self._said = time.monotonic()
        self._times = np.zeros(2)  # ms of loading and of computing since the last line
        console = Console(stderr=True)
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        texts = TextColumn("training"), *columns, TextColumn("{task.description}")
        super().__init__(*texts, console=console, transient=True, disable=not (show and console.is_terminal))
        self._logs, self._task = show and self.disable, self.add_task("", total=total, completed=done)

    def step(self, line: dict[str, Any]) -> None:
        step, now = line["step"] + 1, time.monotonic()
        loss = "nan" if line["loss"] is None else f"{line['loss']:.3f}"
        numbers = f"loss {loss}, {line['images_per_s']:.3g} images/s"
        self.update(self._task, completed=step, description=numbers)
        self._times += line["data_ms"], line["step_ms"]
        if self._logs and (step % self._steps == 0 or now - self._said > LOG_SECONDS):
            self._said, waited = now, float(self._times[0] / self._times.sum())
            left = timedelta(seconds=round((now - self._began) / (step - self._done) * (self._total - step)))
            held = f"; {waited:.0%} of the time waiting for images: raise --workers" if waited > HELD_BACK else ""
            place = f"step {step} of {self._total}, epoch {line['epoch'] + 1}"
            _LOG.info("%s: %s, %s left%s", place, numbers, left, held)
            self._times[:] = 0
