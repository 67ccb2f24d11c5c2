"""A bad configuration stops before any job with one message: file, key, value and what is allowed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cropr.specs import check
from workflow.paper.configuration import Settings, merge, parse_seeds
from workflow.paper.grid import load_grid

CONFIG = Path(__file__).parents[2] / "config"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A copy of config/ to break."""
    return Path(shutil.copytree(CONFIG, tmp_path / "config"))


def edit(file: Path, change: dict[str, Any]) -> None:
    """Lay values over a YAML file."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump(merge(content, change), sort_keys=False), encoding="utf-8")


def edit_row(file: Path, row: str, **values: object) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    next(entry for entry in content["rows"] if entry["row"] == row).update(values)
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def classification(**values: object) -> dict[str, Any]:
    return {"tasks": {"classification": values}}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("ci", classification(recipe={"epoch": 3}), r"ci\.yaml: tasks\..*recipe\.epoch: unknown.*epochs"),
        ("ci", classification(recipe={"epochs": -1}), r"ci\.yaml: tasks\..*\.epochs = -1: must be >= 0"),
        ("ci", {"maps": -1, "colour": "red"}, r"(?s)maps = -1.*colour: unknown key"),
        ("ci", classification(schedules={"r8": {"constant": {"rate": 12}}}),
         r"ci\.yaml: tasks\.classification\.schedules\.r8 = .*12.*: .*lower the rate to \d+ or less"),
        ("paper", classification(schedules={"r50": {"stages": {"at": {24: 50}}}}),
         r"paper\.yaml: tasks\.classification\.schedules\.r50 = .*the last block to prune after is 23"),
        ("ci", classification(variants={"smaller": {"modle": {}}}), r"with variants\.smaller: modle: unknown key"),
        ("ci", {"leave_out": ["coco/nothing"]}, r"leave_out: no row 'coco/nothing'; choose among .*coco/none"),
        ("ci", {"leave_out": ["training_free"]}, r"leave_out: tradeoff reads training_free; leave out both or none"),
        ("ci", {"leave_out": ["coco/none"]}, r"leave_out: coco needs its baseline 'none'"),
        ("ci", {"microbench": {"profil": {"passes": 1}}},
         r"ci\.yaml: microbench: no row 'profil'; choose among .*profile/vit_l_224"),
        ("ci", {"microbench": {"profile/vit_l_224": {"pases": 1}}},
         r"profile\.yaml: row vit_l_224: settings: pases: unknown key; allowed: .*passes"),
    ],
)  # fmt: skip
def test_scale(config: Path, file: str, change: dict[str, Any], message: str) -> None:
    edit(config / f"scales/{file}.yaml", change)
    with pytest.raises(ValueError, match=message):
        load_grid(config, "ci" if file == "ci" else "laptop")


ROW_ERRORS = {
    r"imagenet_methods\.yaml: rows\.2\.option \(row random_r8_llf\): unknown key; allowed: .*options": {"option": 1},
    r"row random_r8_llf: reducer = 'cropper' is unknown; choose one of .*cropr": {"reducer": "cropper"},
    r"row random_r8_llf: reducer 'cropr' has no option mpl; it has .*mlp": {"options": {"mpl": 1}, "reducer": "cropr"},
    r"schedule = 'r9': .* has none, r8, r50": {"schedule": "r9"},
    r"image_size = 'tiny': .* has small": {"image_size": "tiny"},
    r"schedule = 'r8' without a reducer": {"reducer": "none"},
    r"fusion = 'llff' is unknown; choose one of none, .*llf": {"fusion": "llff"},
    r"start = 'model_size/larger_none' is of another variant: larger": {"start": "model_size/larger_none"},
    r"cannot be given with use": {"use": "imagenet_methods/cropr_r8"},
    r"row 'random_r8_llf': give `measure` if, and only if": {"measure": "profile"},
}


@pytest.mark.parametrize("message", ROW_ERRORS)
def test_row(config: Path, message: str) -> None:
    edit_row(config / "experiments/imagenet_methods.yaml", "random_r8_llf", **ROW_ERRORS[message])
    with pytest.raises(ValueError, match=message):
        load_grid(config, "ci")


def test_artefact(config: Path) -> None:
    file = config / "experiments/relevance.yaml"
    edit_row(file, "cropr", use="imagenet_methods/cropr")
    with pytest.raises(ValueError, match=r"use = 'imagenet_methods/cropr' is no row; choose one of .*cropr_r8_llf"):
        load_grid(config, "ci")
    edit(file, {"baseline": "nobody"})
    with pytest.raises(ValueError, match=r"relevance\.yaml: baseline = 'nobody' is no row; choose one of cropr"):
        load_grid(config, "ci")
    edit(file, {"rows": [{"row": "cropr", "label": "Cropr"}] * 2})
    with pytest.raises(ValueError, match="'cropr' is given twice"):
        load_grid(config, "ci")
    edit_row(config / "experiments/profile.yaml", "scoring", measure="score")
    file.unlink()
    with pytest.raises(ValueError, match=r"row scoring: measure = 'score': choose one of .*scoring"):
        load_grid(config, "ci")


def test_files(config: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"huge\.yaml: no such file; there are: ci, fashion, laptop, paper, w"):
        load_grid(CONFIG, "huge")
    (config / "scales/ci.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"ci\.yaml is neither JSON nor YAML"):
        load_grid(config, "ci")


def test_overrides_are_laid_over_the_scale() -> None:
    grid = load_grid(CONFIG, "ci", overrides={"tasks": {"classification": {"recipe": {"min_lr": 0.25}}}})
    runs = [spec for spec in grid.runs.values() if spec.task == "classification"]
    assert {(spec.recipe.min_lr, spec.recipe.batch_size) for spec in runs} == {(0.25, 32)}
    with pytest.raises(ValueError, match=r"ci\.yaml with overrides: recipes: unknown key"):
        load_grid(CONFIG, "ci", overrides={"recipes": 1})
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_settings_and_data_roots(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pretrain = 'yes': .*'shipped' or 'make'"):
        check(Settings, {"pretrain": "yes"}, "config/config.yaml")
    none = dict.fromkeys(("imagenet", "ade20k", "coco", "folder"))
    with pytest.raises(ValueError, match=r"config\.yaml: imagenet = null.*--config imagenet=/path"):
        load_grid(CONFIG, "paper", roots=none)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"imagenet = {tmp_path}: .*val is missing"):
        load_grid(CONFIG, "paper", roots=none | {"imagenet": tmp_path})


def test_seeds() -> None:
    for given in (3, "3"):
        assert parse_seeds(given) == (0, 1, 2)
    for listed in ([0, 4], ["0", "4"], "0,4", "[0, 4]"):
        assert parse_seeds(listed) == (0, 4)  # type: ignore[arg-type]
    for wrong in (0, -1, "x", [], [1, 1], [-1], "1.5"):
        with pytest.raises(ValueError, match="give a number of seeds"):
            parse_seeds(wrong)  # type: ignore[arg-type]
