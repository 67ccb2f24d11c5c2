"""Errors of a bad configuration: one message that names file, key, value and what is allowed, before any job starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from workflow.paper.configuration import merge, parse_seeds, read_settings
from workflow.paper.grid import load_grid

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
SCALES = ["ci", "laptop", "workstation", "paper"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A copy of config/ to break."""
    return Path(shutil.copytree(CONFIG, tmp_path / "config"))


def edit(file: Path, **values: object) -> None:
    """Lay values over a YAML file; dots in keys go down."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    for key, value in values.items():
        place = content
        *parents, last = key.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def edit_row(file: Path, row: str, **values: object) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    next(entry for entry in content["rows"] if entry["row"] == row).update(values)
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def test_unknown_key_of_a_scale(config: Path) -> None:
    edit(config / "scales/ci.yaml", tasks__classification__recipe__epoch=3)
    with pytest.raises(
        ValueError, match=r"ci\.yaml: unknown key tasks\.classification\.recipe\.epoch = 3; allowed: .*epochs"
    ):
        load_grid(config, "ci")


def test_bad_value_of_a_scale(config: Path) -> None:
    edit(config / "scales/ci.yaml", tasks__classification__recipe__epochs=0)
    with pytest.raises(ValueError, match=r"ci\.yaml: tasks\.classification\.recipe\.epochs = 0: .*greater than 0"):
        load_grid(config, "ci")


def test_all_problems_of_a_file_come_in_one_message(config: Path) -> None:
    edit(config / "scales/ci.yaml", tasks__classification__recipe__epochs=0, maps=-1, colour="red")
    with pytest.raises(ValueError, match=r"(?s)recipe\.epochs.*maps = -1.*colour = 'red'"):
        load_grid(config, "ci")


def test_unknown_key_of_a_row_names_the_row(config: Path) -> None:
    edit_row(config / "experiments/ablations.yaml", "no_mlp", option={"mlp": False})
    with pytest.raises(
        ValueError, match=r"ablations\.yaml: unknown key rows\.6\.option \(row no_mlp\).*allowed: .*options"
    ):
        load_grid(config, "ci")


def test_unknown_reducer(config: Path) -> None:
    edit_row(config / "experiments/ablations.yaml", "no_mlp", reducer="cropper")
    with pytest.raises(
        ValueError, match=r"ablations\.yaml: row no_mlp: reducer = 'cropper' is unknown; choose .*cropr"
    ):
        load_grid(config, "ci")


def test_unknown_option_of_a_reducer(config: Path) -> None:
    edit_row(config / "experiments/ablations.yaml", "no_mlp", options={"mpl": False})
    with pytest.raises(ValueError, match=r"row no_mlp: options = \{'mpl': False\}.*no option mpl; it has .*mlp"):
        load_grid(config, "ci")


def test_impossible_schedule(config: Path) -> None:
    edit(config / "scales/laptop.yaml", tasks__classification__schedules__r8={"constant": {"rate": 12}})
    with pytest.raises(
        ValueError,
        match=r"laptop\.yaml: tasks\.classification\.schedules\.r8 = .*12.*: .*lower the rate to \d+ or less",
    ):
        load_grid(config, "laptop")


def test_impossible_schedule_of_the_measured_model_is_found_at_every_scale(config: Path) -> None:
    edit(config / "scales/paper.yaml", tasks__classification__schedules__r50={"stages": {"at": {24: 50}}})
    with pytest.raises(
        ValueError, match=r"paper\.yaml: tasks\.classification\.schedules\.r50 = .*the last block to prune after is 23"
    ):
        load_grid(config, "laptop")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"schedule": "r9"}, r"schedule = 'r9': .* has none, r8, r50"),
        ({"image_size": "tiny"}, r"image_size = 'tiny': .* has small"),
        ({"reducer": "none"}, r"schedule = 'r8' without a reducer"),
        ({"fusion": "llff"}, r"fusion.* = 'llff': .*'none', .*'llf'"),
        ({"use": "imagenet_methods/cropr_r8"}, r"cannot stand beside use"),
    ],
)
def test_names_that_do_not_fit(config: Path, row: dict[str, object], message: str) -> None:
    edit_row(config / "experiments/imagenet_methods.yaml", "random_r8_llf", **row)
    with pytest.raises(ValueError, match=message):
        load_grid(config, "ci")


def test_use_of_a_row_that_is_not_there(config: Path) -> None:
    edit_row(config / "experiments/relevance.yaml", "cropr", use="imagenet_methods/cropr")
    with pytest.raises(ValueError, match=r"use = 'imagenet_methods/cropr' is no row; choose one of .*cropr_r8_llf"):
        load_grid(config, "ci")


def test_rows_are_unique_and_the_baseline_is_one(config: Path) -> None:
    file = config / "experiments/relevance.yaml"
    edit(file, baseline="nobody")
    with pytest.raises(ValueError, match=r"baseline = 'nobody' is no row; choose one of cropr"):
        load_grid(config, "ci")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    content["rows"].append(content["rows"][0])
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match="'cropr' is given twice"):
        load_grid(config, "ci")


def test_laboratory(config: Path) -> None:
    edit(config / "scales/ci.yaml", lab__profil={"passes": 1})
    with pytest.raises(ValueError, match=r"ci\.yaml: lab\.profil: no such measurement; there are .*profile/vit_l_224"):
        load_grid(config, "ci")
    edit(config / "scales/ci.yaml", lab__profil={}, lab__profile={"pases": 1})
    with pytest.raises(ValueError, match=r"profile\.yaml: row vit_l_224: settings: unknown key pases = 1; .*passes"):
        load_grid(config, "ci")
    edit_row(config / "experiments/ablations.yaml", "no_mlp", measure="profile")
    with pytest.raises(ValueError, match=r"row 'no_mlp': rows have `measure` exactly where"):
        load_grid(config, "ci")


def test_unknown_scale() -> None:
    with pytest.raises(FileNotFoundError, match=r"huge\.yaml: no such file; there are: ci, laptop, paper, workstation"):
        load_grid(CONFIG, "huge")


def test_broken_yaml(config: Path) -> None:
    (config / "scales/ci.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"ci\.yaml: not YAML"):
        load_grid(config, "ci")


def test_data_root_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml: imagenet = null.*--config imagenet=/path"):
        load_grid(CONFIG, "paper", roots=dict.fromkeys(("imagenet", "ade20k", "coco", "folder")))
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"imagenet = {tmp_path}: .*val is missing"):
        load_grid(CONFIG, "paper", roots=dict.fromkeys(("ade20k", "coco", "folder")) | {"imagenet": tmp_path})


def test_overrides_are_laid_over_the_scale() -> None:
    grid = load_grid(CONFIG, "ci", overrides={"tasks": {"classification": {"recipe": {"epochs": 2}}}})
    runs = [spec for spec in grid.runs.values() if spec.task == "classification"]
    assert {spec.recipe.epochs for spec in runs} == {2}
    assert {spec.recipe.batch_size for spec in runs} == {32}
    with pytest.raises(ValueError, match=r"ci\.yaml with overrides: unknown key recipes"):
        load_grid(CONFIG, "ci", overrides={"recipes": 1})
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_settings_name_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"config\.yaml: unknown key scales = 'ci'; allowed: .*folder, imagenet"):
        read_settings({"scales": "ci"})
    with pytest.raises(ValueError, match=r"pretrain = 'yes': .*'shipped' or 'make'"):
        read_settings({"pretrain": "yes"})


@pytest.mark.parametrize(
    ("given", "seeds"),
    [(3, (0, 1, 2)), ("3", (0, 1, 2)), ([0, 4], (0, 4)), (["0", "4"], (0, 4)), ("0,4", (0, 4)), ("[4]", (4,))],
)
def test_seeds(given: object, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(given) == seeds  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0, -1, "x", [], [1, 1], [-1], "1.5"])
def test_seeds_that_are_none(wrong: object) -> None:
    with pytest.raises(ValueError, match="give a number of seeds"):
        parse_seeds(wrong)  # type: ignore[arg-type]
