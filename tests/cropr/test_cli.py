"""The command line: every verb explains itself, examples work as printed, and mistakes end in one message."""

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

import pytest
from PIL import Image

from cropr.cli import VERBS, build_parser, main

ROOT = Path(__file__).parents[2]


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of every ``python -m cropr ...`` in a text.

    A trailing backslash continues a command; a backquote, a ``#`` or three spaces end it, as comments do in help texts.
    """
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        for command in re.findall(r"-m cropr (\w[^`#]*)", line):
            if not re.search(r"\.\.\.|…|<", command):  # a pattern rather than a command
                yield shlex.split(re.split(r"\s{3,}| > | \| ", command)[0])


def test_finds_commands() -> None:
    text = "  $ python -m cropr bench --rate 8 \\\n     --fusion llf    words\n`python -m cropr doctor --json > a`, yes"
    assert list(commands(text)) == [["bench", "--rate", "8", "--fusion", "llf"], ["doctor", "--json"]]


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
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--data", "images", "--model", "vit_nonsense"], "vit_nonsense"),
        (["train", "--data", "images", "--model", "vit_tiny_patch16_224", "--schedule", "{nonsense"], "nonsense"),
        (["train", "--data", "images", "--model", "vit_tiny_patch16_224", "--rate", "900"], "900"),
        (["train", "--data", "images", "--model", "vit_tiny_patch16_224", "--set", "recipe.epoch=3"], "recipe.epoch"),
        (["evaluate", "--run", "nowhere", "--data", "images"], "nowhere"),
        (["bench", "--model", "vit_nonsense"], "vit_nonsense"),
        (["bench", "--model", "vit_tiny_patch16_224", "--rate", "900"], "900"),
        (["compare", "--manifest", "nowhere.json", "--row", "any"], "nowhere.json"),
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
        [sys.executable, "-m", "cropr", "compare", "--manifest", "nowhere.json", "--row", "any"],
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
