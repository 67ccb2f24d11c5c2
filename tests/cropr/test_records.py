"""Records: whole or not at all, nothing but finite numbers, and where they come from."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cropr import records
from cropr.records import provenance, read_record, write_record


def test_a_record_round_trips_with_sorted_keys(tmp_path):
    record = {"kind": "train", "metrics": {"top1": 89.4, "images": 3}, "tokens": [65, 56], "commit": None}
    write_record(tmp_path / "run" / "record.json", record)
    assert read_record(tmp_path / "run" / "record.json") == record
    assert read_record(tmp_path / "run") == record
    text = (tmp_path / "run" / "record.json").read_text()
    assert list(json.loads(text)) == ["commit", "kind", "metrics", "tokens"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_with_its_key(tmp_path, number):
    record = {"metrics": {"loss": 1.0}, "series": {"relevance": [{"block": 1, "object_kept": number}]}}
    with pytest.raises(ValueError, match=r"record\.series\.relevance\[0\]\.object_kept"):
        write_record(tmp_path / "record.json", record)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_record_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_record(path, {"seed": 0})

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(records.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_record(path, {"seed": 1})
    assert read_record(path) == {"seed": 0}
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_json_is_refused(tmp_path):
    with pytest.raises(TypeError):
        write_record(tmp_path / "record.json", {"out": tmp_path})


def test_reading_names_the_file_and_the_fix(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"record\.json: no record"):
        read_record(tmp_path)
    (tmp_path / "record.json").write_text('{"kind": "tra')
    with pytest.raises(ValueError, match=r"record\.json: not a record.*run the job again"):
        read_record(tmp_path)
    (tmp_path / "record.json").write_text("[1]")
    with pytest.raises(ValueError, match="top level is a list"):
        read_record(tmp_path)


def test_provenance_has_what_a_reader_needs():
    now = time.time()
    found = provenance(now - 2, precision="bf16", data_fingerprint="abc", attention="flash")
    assert set(found) >= {
        "commit", "dirty", "python", "packages", "device", "cpu", "threads", "precision", "started", "wall_s",
        "peak_memory_mb", "data_fingerprint",
    }  # fmt: skip
    assert found["wall_s"] == pytest.approx(2, abs=0.9)
    assert found["packages"]["torch"].startswith("2.")
    assert found["precision"] == "bf16"
    assert found["attention"] == "flash"
    lock = Path(records.__file__).parents[1] / "requirements.lock"
    assert found["lock_sha256"] == hashlib.sha256(lock.read_bytes()).hexdigest()
    assert 10 < found["peak_memory_mb"] < 100_000
    json.dumps(found)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"ls-files": "records.py", "rev-parse": "0a1b", "status": ""}, ("0a1b", False)),
        ({"ls-files": "records.py", "rev-parse": "0a1b", "status": " M cropr/model.py"}, ("0a1b", True)),
        ({"ls-files": None, "rev-parse": "0a1b", "status": ""}, (None, None)),  # a venv inside some repository
        ({"ls-files": "records.py", "rev-parse": None, "status": ""}, (None, None)),  # no commit yet
    ],
)
def test_commit_and_dirty_flag(monkeypatch, tmp_path, answers, expected):
    monkeypatch.setattr(records, "_git", lambda verb, *rest: answers[verb])
    monkeypatch.setattr(records, "__file__", str(tmp_path / "cropr/records.py"))
    records.code_origin.cache_clear()
    found = provenance(time.time())
    records.code_origin.cache_clear()
    assert (found["commit"], found["dirty"], found["lock_sha256"]) == (*expected, None)


def test_records_and_scenes_load_no_torch():
    code = "import sys, time, cropr.data.layouts; from cropr.records import provenance; provenance(time.time())"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
