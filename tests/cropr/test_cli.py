"""The command line: every verb explains itself, its examples parse, and errors are one message with status 2."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
from PIL import Image
from pydantic import Field

from cropr.__main__ import VERBS, build_parser, main
from cropr.bench.specs import BenchSpec, PlanSpec
from cropr.cli.spec_flags import add_fields, given, make_spec
from cropr.records import provenance, read_record
from cropr.specs import ScenesSpec, Spec

ROOT = Path(__file__).parents[2]


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of every ``python -m cropr ...`` in a text.

    A trailing backslash continues a command; a backquote, a ``#`` or three spaces end it, as comments do in help texts.
    """
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        for command in re.findall(r"-m cropr (\w[^`#]*)", line):
            if not re.search(r"\.\.\.|…|<", command):  # a pattern rather than a command
                yield shlex.split(re.split(r"\s{3,}| > | \| ", command)[0])


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_parse(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m cropr {verb}" in shown
    text = import_module(f"cropr.cli.{verb}").__doc__
    assert text is not None
    examples = list(commands(text))
    assert examples
    for arguments in examples:
        assert build_parser(arguments[0]).parse_args(arguments).run


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Flags and positionals of a parser and of those below it."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for child in action.choices.values():
                yield from leaves(child)
        else:
            yield action


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_is_explained(verb: str) -> None:
    flags = list(leaves(build_parser(verb)))
    assert len(flags) > len(VERBS) + 1  # more than the --help of each
    assert not [action.option_strings or action.dest for action in flags if not action.help]


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "Makefile", "docs", "config", "notebooks"])
def test_documented_commands_parse(file: str) -> None:
    path = ROOT / file
    files = (
        [path] if path.is_file() else [found for found in sorted(path.rglob("*")) if found.suffix in (".md", ".yaml")]
    )
    for found in files:
        for arguments in commands(found.read_text(encoding="utf-8")):
            if len(arguments) == 1 and arguments[0] in VERBS:  # names the verb
                continue
            try:
                build_parser(arguments[0]).parse_args(arguments)
            except SystemExit as stop:
                assert not stop.code, f"{found}: python -m cropr {shlex.join(arguments)} is refused"  # noqa: PT017


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["doctor", "--nonsense"], ["train"], ["bench", "--rate", "many"]]
)
def test_refuses_what_it_does_not_know(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder ``images`` with two classes in the working directory."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (99 * number, 0, 0)).save(tmp_path / "images" / split / name / "0.png")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["data", "check", "nowhere"], "nowhere"),
        (["data", "check", "images", "--classes", "9"], "error: images has 2 classes"),
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--data", "images", "--model", "vit_nonsense"], "vit_nonsense"),
        (["train", "--data", "images", "--model", "google/vit-base-patch16-224"], "cropr.prune(model, schedule)"),
        (["train", "--data", "images", "--model", "vit_tiny_patch16_224", "--schedule", "{nonsense"], "nonsense"),
        (["train", "--data", "images", "--model", "vit_tiny_patch16_224", "--rate", "900"], "900"),
        (["train", "--data", "images", "--model", "vit_tiny_patch16_224", "--set", "recipe.epoch=3"], "recipe.epoch"),
        (["evaluate", "--run", "nowhere", "--data", "images"], "nowhere"),
        (["bench", "--model", "vit_nonsense"], "vit_nonsense"),
        (["bench", "--model", "resnet18"], "no adapter for ResNet"),
        (["plan", "--model", "resnet18"], "no adapter for ResNet"),
        (["bench", "--model", "vit_tiny_patch16_224", "--rate", "900"], "900"),
        (
            ["bench", "--model", "vit_tiny_patch16_224", "--spec", "{}"],
            "--spec has the values of --model: leave --model out",
        ),
        (["bench", "--model", "m", "--rounds", "2"], "rounds = 2: must be >= 3"),
        (["bench", "--model", "m", "--rate", "4", "--schedule", "{}"], "give one of them"),
        (["bench", "--spec", "missing.json"], "--spec missing.json: no such file"),
        (["plan"], "name a model with --model"),
        (["plan", "--model", "m", "--reducer", "none"], "reducer"),
        (["bench", "--model", "m", "--threads", "0"], "--threads 0: must be 1 or more"),
        (["export", "--out", "x"], "name a model with --model"),
        (["export", "--run", "nowhere", "--out", "x"], "nowhere: no such directory"),
        (["export", "--run", "nowhere", "--model", "m", "--out", "x"], "--run has the values of --model"),
        (["export", "--model", "vit_nonsense", "--out", "x"], "vit_nonsense"),
        (["export", "--model", "m", "--rounds", "0", "--out", "x"], "--rounds 0: must be 1 or more"),
        (["show", "--run", "nowhere", "--data", "images", "--out", "maps"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("images")
def test_user_error_is_one_message_and_status_2(
    arguments: list[str], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert main(arguments) == 2
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("error: ")
    assert named in caplog.messages[0]


def test_status_and_message_reach_the_shell(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cropr", "plan", "--spec", "nowhere"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "nowhere" in message
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


# Flags from fields --------------------------------------------------------------------------------------------------


class Sample(Spec):
    """Every kind of field."""

    count: int = 4
    """Of what ``it`` counts, 100 % of them."""
    share: float | None = None
    """Of all."""
    epochs: int | float = 2
    """Of training."""
    kind: Literal["a", "b"] = "a"
    """Of thing."""
    fast: bool = False
    """Skip the slow part."""
    span: tuple[float, float] = (1.0, 2.0)
    """From and to."""
    targets: tuple[Annotated[float, Field(ge=1)], ...] = (1.5,)
    names: list[Literal["x", "y"]] = Field(["x"], description="Of things.")
    other: ScenesSpec = ScenesSpec()
    values: dict[str, int] = Field({})


def parser_of(**arguments: object) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_fields(parser, Sample, **arguments)  # type: ignore[arg-type]
    return parser


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ([], {}),
        (
            ["--count", "3", "--share", "0.5", "--kind", "b", "--fast"],
            {"count": 3, "share": 0.5, "kind": "b", "fast": 1},
        ),
        (["--epochs", "3"], {"epochs": 3}),
        (["--epochs", "0.5"], {"epochs": 0.5}),
        (["--span", "1", "3", "--targets", "2", "3"], {"span": [1, 3], "targets": [2, 3]}),
        (["--names", "y", "x"], {"names": ["y", "x"]}),
    ],
)
def test_flags_give_the_values_of_their_fields(words: list[str], values: dict[str, object]) -> None:
    found = given(parser_of().parse_args(words), Sample.model_fields)
    assert found == values
    assert make_spec(found, kind=Sample) == Sample.model_validate(values)
    assert isinstance(found.get("epochs", 3), float) == (words == ["--epochs", "0.5"])


def test_help_of_training_lists_what_set_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert {"recipe.query_lr", "data.augment.mixup", "prune.aux_weight", "model.args", "init"} <= set(words)


def test_help_of_a_flag_is_the_docstring_of_its_field() -> None:
    shown = " ".join(parser_of(defaults={"epochs": "as needed"}).format_help().split())
    assert "--count N of what it counts, 100 % of them (default 4)" in shown
    assert "(default as needed)" in shown
    assert "--other" not in shown


# Verbs that measure, with stand-ins for what they call ---------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Replaces ``measure`` of a module; returns what it was called with, and where the verb writes its record."""
    monkeypatch.chdir(tmp_path)

    def replace(module: str, **result: object) -> dict[str, object]:
        seen: dict[str, object] = {}

        def measure(spec: Spec, device: str, tick) -> dict[str, object]:  # type: ignore[no-untyped-def]
            tick("build")
            seen.update(spec=spec, device=device)
            told = provenance(0.0, attention={})
            return {"id": spec.digest(), "spec": spec.model_dump(mode="json"), "provenance": told, **result}

        fake = ModuleType(module)
        fake.measure = measure  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module, fake)
        return seen

    return replace


def test_bench_prints_both_models_and_reads_its_record_again(stand_in, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"images_per_s": 2.5, "base_images_per_s": 1.25, "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1}
    seen = stand_in(
        "cropr.bench.throughput", kind="bench", tokens=[17, 10], metrics={**pair, "batch_size": 2, "mac_ratio": 1.8}
    )
    flags = ["--model", "m", "--rate", "3", "--fusion", "none", "--batch-size", "8", "--compile", "--device", "cpu"]
    assert main(["bench", *flags, "--out", "a"]) == 0
    first = seen["spec"]
    assert isinstance(first, BenchSpec)
    assert (first.batch_size, first.compile, first.prune.schedule["constant"]["rate"]) == (8, True, 3)
    assert main(["bench", "--spec", "a/record.json", "--out", "b", "--device", "cpu"]) == 0
    assert read_record("a")["id"] == read_record("b")["id"] == first.digest()
    shown = capsys.readouterr().out
    for text in ("1.25", "2.5", "2 [1.9, 2.1]", "17 to 10", "batch 2 (out of memory with 8)"):
        assert text in shown


def test_plan_prints_every_target_and_why_one_is_not_reached(stand_in, capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"speedup": 1.52, "speedup_low": 1.5, "speedup_high": 1.54}
    reached = {"schedule": "R=9", "predicted": 1.6, "metrics": measured, "reached": True, "reason": None}
    missed = {"schedule": None, "predicted": None, "metrics": {}, "reached": False, "reason": "too few tokens"}
    cells = [{"target": 1.5, "rounds": 7, **reached}, {"target": 9.0, "rounds": 7, **missed}]
    seen = stand_in("cropr.bench.plan", kind="plan", cells=cells)
    assert main(["plan", "--model", "m", "--targets", "1.5", "9", "--verify", "--out", "a", "--device", "cpu"]) == 0
    assert isinstance(seen["spec"], PlanSpec)
    assert (seen["spec"].targets, seen["spec"].verify) == ((1.5, 9.0), True)
    shown = capsys.readouterr().out
    for text in ("R=9", "1.52", "too few tokens"):
        assert text in shown
    assert main(["plan", "--spec", "a/record.json", "--verify", "--device", "cpu"]) == 0
    assert main(["plan", "--spec", "a/record.json", "--targets", "2"]) == 2
