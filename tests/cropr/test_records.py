"""Records: whole or not at all, finite numbers, where they come from; what the doctor tells of a machine."""

import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tiny
from torch.utils import collect_env

from cropr import records
from cropr.__main__ import main
from cropr.cli.doctor import collect, find_problems, measure_loader
from cropr.records import provenance, read_record, write_record


def test_what_cannot_be_written_leaves_the_old_record_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_record(path, {"seed": 0})
    for number in (float("nan"), -float("inf")):
        record = {"series": {"relevance": [{"block": 1, "object_kept": number}]}}
        with pytest.raises(ValueError, match=r"record\.series\.relevance\[0\]\.object_kept"):
            write_record(path, record)
    with pytest.raises(TypeError):
        write_record(path, {"out": tmp_path})
    monkeypatch.setattr(records.os, "fsync", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_record(path, {"seed": 1})
    assert read_record(path) == {"seed": 0}
    assert list(tmp_path.iterdir()) == [path]


def test_reading_names_the_file_and_the_fix(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"record\.json: no record"):
        read_record(tmp_path)
    for text, says in (('{"kind": "tra', r"record\.json: not a record.*run the job again"), ("[1]", "level is a list")):
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            read_record(tmp_path)


def test_provenance_has_what_a_reader_needs():
    found = provenance(time.time() - 2, precision="bf16", data_fingerprint="abc", attention="flash")
    assert set(found) >= {"commit", "dirty", "python", "device", "cpu", "threads", "started", "data_fingerprint"}
    assert found["wall_s"] == pytest.approx(2, abs=0.9)
    assert found["packages"]["torch"].startswith("2.")
    assert (found["precision"], found["attention"]) == ("bf16", "flash")
    lock = Path(records.__file__).parents[1] / "requirements.lock"
    assert found["lock_sha256"] == hashlib.sha256(lock.read_bytes()).hexdigest()
    assert 10 < found["peak_memory_mb"] < 100_000
    json.dumps(found)


def test_commit_and_dirty_flag(monkeypatch, tmp_path):
    clean = {"ls-files": "records.py", "rev-parse": "0a1b", "status": ""}
    for answers, expected in (
        (clean, ("0a1b", False)),
        (clean | {"status": " M cropr/model.py"}, ("0a1b", True)),
        (clean | {"ls-files": None}, (None, None)),  # a venv inside some repository
        (clean | {"rev-parse": None}, (None, None)),  # no commit yet
    ):
        monkeypatch.setattr(records, "_git", lambda verb, *rest, told=answers: told[verb])
        monkeypatch.setattr(records, "__file__", str(tmp_path / "cropr/records.py"))
        records.code_origin.cache_clear()
        found = provenance(time.time())
        records.code_origin.cache_clear()
        assert (found["commit"], found["dirty"], found["lock_sha256"]) == (*expected, None)


def test_records_and_scenes_load_no_torch():
    code = "import sys, time, cropr.data.layouts; from cropr.records import provenance; provenance(time.time())"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with one data root that exists and one that does not."""
    (tmp_path / "images").mkdir()
    file = tmp_path / "config.yaml"
    file.write_text(f"imagenet: {tmp_path / 'images'}\nfolder: {tmp_path / 'nowhere'}\n")
    return file


def test_json_holds_what_a_bug_report_needs_and_nothing_else_of_the_environment(config, monkeypatch, capsys):
    monkeypatch.setenv("SOME_TOKEN", "hush-hush")
    monkeypatch.setenv("CONDA_PREFIX", "secret-folder")
    assert main(["doctor", "--json", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert not re.search("hush-hush|secret-folder", shown)
    report = json.loads(shown)
    assert {"cropr", "commit", "python", "torch", "torchvision", "timm", "snakemake"} <= set(report["software"])
    assert report["software"]["conda_environment_active"] is True
    assert report["torch"]["threads"] == 1  # as conftest.py sets it
    assert {"os", "cuda_compiled_version", "is_cuda_available"} <= set(report["torch"])
    assert report["machine"]["cores_usable"] >= 1
    roots = report["folders"]["data_roots"]
    assert (roots["imagenet"]["readable"], roots["folder"]["readable"]) == (True, False)


def test_missing_data_root_is_a_problem(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_env, "get_env_info", lambda: SimpleNamespace(_asdict=dict))  # it would ask pip
    assert any("nowhere.yaml" in problem for problem in find_problems(collect(tmp_path / "nowhere.yaml", tmp_path)))
    before = sorted(tmp_path.rglob("*"))
    problems = "\n".join(find_problems(collect(config, tmp_path / "a/b/results")))
    assert sorted(tmp_path.rglob("*")) == before  # it looks and writes nothing
    assert re.search("folder.*nowhere", problems)
    assert not re.search("cannot be written|imagenet", problems)


def test_works_without_torch(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` fail
    assert main(["doctor", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "torch cannot be imported" in shown
    assert "cores_usable" in shown


def test_the_loader_alone_is_measured(tmp_path: Path) -> None:
    found = measure_loader(tiny.write_folder(tmp_path), "imagenet", workers=0, seconds=0.05)
    assert found["images_per_s"] > 0
