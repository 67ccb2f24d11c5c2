"""The command line: every verb explains itself, its examples parse, and errors are one message with status 2."""

import argparse
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tiny
from pydantic import Field

from cropr.__main__ import VERBS, build_parser, main
from cropr.cli.spec_flags import add_fields, given, make_spec
from cropr.specs import ScenesSpec, Spec

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--data", "images", "--model"]


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of every ``python -m cropr ...`` in a text.

    A trailing backslash continues a command; a backquote, a ``#`` or three spaces end it, as comments do in help texts.
    """
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        for command in re.findall(r"-m cropr (\w[^`#]*)", line):
            if not re.search(r"\.\.\.|…|<", command):  # a pattern rather than a command
                yield shlex.split(re.split(r"\s{3,}| > | \| ", command)[0])


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_flag_and_has_examples_that_parse(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"python -m cropr {verb}" in capsys.readouterr().out
    assert not [action.option_strings or action.dest for action in leaves(build_parser(verb)) if not action.help]
    examples = list(commands(str(import_module(f"cropr.cli.{verb}").__doc__)))
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


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "Makefile", "docs", "config", "notebooks"])
def test_documented_commands_parse(file: str) -> None:
    path = ROOT / file
    files = [path] if path.is_file() else [*path.rglob("*.md"), *path.rglob("*.yaml")]
    for found in files:
        for arguments in commands(found.read_text(encoding="utf-8")):
            if len(arguments) == 1 and arguments[0] in VERBS:  # names the verb
                continue
            try:
                build_parser(arguments[0]).parse_args(arguments)
            except SystemExit as stop:
                assert not stop.code, f"{found}: python -m cropr {shlex.join(arguments)} is refused"  # noqa: PT017


@pytest.mark.parametrize("arguments", ["", "nonsense", "doctor --nonsense", "train", "bench --rate many"])
def test_refuses_what_it_does_not_know(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder ``images`` with three classes in the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny.write_folder(tmp_path / "images", 6, 3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["data", "check", "nowhere"], "nowhere"),
        (["data", "check", "images", "--classes", "9"], "error: images has 3 classes"),
        (["train", "--data", "nowhere"], "nowhere"),
        ([*TRAIN, "vit_smal_patch16_224"], "close to it: vit_small_patch16_224"),
        ([*TRAIN, "google/vit-base-patch16-224"], "cropr.prune(model, schedule)"),
        ([*TRAIN, "ViT-B/16"], "close to it: vit_base_patch16_"),
        ([*TRAIN, "test_vit", "--auto-augment", "bogus"], "auto_augment = 'bogus': "),
        ([*TRAIN, "test_vit", "--freeze-encoder"], "with --pretrained or --init"),
        (TRAIN[:-1], "name a model with --model"),
        ([*TRAIN, "test_vit", "--tensorboard"], "--tensorboard needs the package tensorboard"),
        ([*TRAIN, "test_vit", "--reducer", "none", "--rate", "4"], "--reducer none prunes nothing"),
        ([*TRAIN, "test_vit", "--batch-size", "64"], "fewer than one batch of 64"),
        ([*TRAIN, "test_vit", "--lr", "inf"], "--lr inf: must be a finite number above 0"),
        ([*TRAIN, "test_vit", "--lr", "1e-3", "--set", "recipe.batch_size=2"], "use --batch-size"),
        ([*TRAIN, "naflexvit_base_patch16_gap", "--batch-size", "2"], "can be pruned in Python alone"),
        ([*TRAIN, "test_vit", "--set", "recipe.clip_grad=NaN"], "recipe.clip_grad = nan: must be a finite number"),
        ([*TRAIN, "test_vit", "--image-size", "28"], "image_size = 28: must be a multiple of the model's patch size"),
        (["evaluate", "--data", "images"], "name what to evaluate"),
        (["evaluate", "--data", "images", "--run", "nowhere"], "nowhere: no such directory"),
        (["evaluate", "--data", "images", "--run", "nowhere", "--spec", "x.yaml"], "leave --spec out"),
        (["evaluate", "--predictions", "a.json"], "--predictions and --annotations go together"),
        (["evaluate", "--predictions", "a", "--annotations", "b", "--data", "x", "--best"], "leave --data, --best out"),
        (["evaluate", "--predictions", "a.json", "--annotations", "b.json"], ".json: no such file"),
        (["bench", "--model", "vit_nonsense"], "vit_nonsense"),
        (["bench", "--model", "m", "--spec", "{}"], "--spec has the values of --model: leave --model out"),
        (["plan", "--spec", "{}", "--targets", "2"], "--targets"),
        (["data", "scenes", "--out", "set", "--spec", "{"], "--spec is neither JSON"),
        (["bench", "--model", "m", "--rounds", "2"], "rounds = 2: must be >= 3"),
        (["bench", "--model", "m", "--rate", "4", "--schedule", "{}"], "give one of them"),
        (["bench", "--spec", "missing.json"], "--spec missing.json: no such file"),
        (["bench", "--model", "m", "--threads", "0"], "--threads 0: must be 1 or more"),
        (["export", "--run", "nowhere", "--out", "x"], "nowhere: no such directory"),
        (["export", "--run", "nowhere", "--model", "m", "--out", "x"], "--run has the values of --model"),
        (["show", "--run", "nowhere", "--data", "images", "--out", "x.npz"], "nowhere"),
        (["show", "--run", "nowhere", "--data", "images", "--out", "x.png"], "must end in .npz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("images")
def test_user_error_is_one_message_and_status_2(arguments: list[str], named: str, caplog, monkeypatch) -> None:
    monkeypatch.setattr("cropr.cli.train.find_spec", lambda name: None)
    with caplog.at_level(logging.ERROR):
        assert main(arguments) == 2
    (message,) = caplog.messages
    assert message.startswith("error: ")
    assert named in message
    assert sorted(file.name for file in Path.cwd().iterdir()) == ["images"], "nothing is written"


def test_status_and_message_reach_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cropr", "plan", "--spec", "nowhere"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.match("error: .*nowhere", result.stderr.strip().splitlines()[-1])
    assert "Traceback" not in result.stderr


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


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("", {}),
        ("--count 3 --share 0.5 --kind b --fast", {"count": 3, "share": 0.5, "kind": "b", "fast": 1}),
        ("--epochs 3", {"epochs": 3}),
        ("--epochs 0.5", {"epochs": 0.5}),
        ("--span 1 3 --targets 2 3", {"span": [1, 3], "targets": [2, 3]}),
        ("--names y x", {"names": ["y", "x"]}),
    ],
)
def test_flags_give_the_values_of_their_fields(words: str, values: dict[str, object]) -> None:
    parser = argparse.ArgumentParser()
    add_fields(parser, Sample)
    found = given(parser.parse_args(words.split()), Sample.model_fields)
    assert found == values
    assert make_spec(found, kind=Sample) == Sample.model_validate(values)
    assert isinstance(found.get("epochs", 3), float) == (words == "--epochs 0.5")
