"""Records: whole or not at all, nothing but finite numbers, and where they come from."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest

from cropr import records
from cropr.records import provenance, read_record, write_record


def test_a_record_round_trips_with_sorted_keys(tmp_path):
    record = {"kind": "train", "metrics": {"top1": 89.4, "images": 3}, "tokens": [65, 56], "commit": None}
    write_record(tmp_path / "run" / "record.json", record)
    assert read_record(tmp_path / "run" / "record.json") == read_record(tmp_path / "run") == record
    assert list(json.loads((tmp_path / "run" / "record.json").read_text())) == sorted(record)


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
def test_commit_and_dirty_flag(monkeypatch, answers, expected):
    monkeypatch.setattr(records, "_git", lambda verb, *rest: answers[verb])
    records._checkout.cache_clear()
    found = provenance(time.time())
    records._checkout.cache_clear()
    assert (found["commit"], found["dirty"]) == expected


def test_records_and_scenes_load_no_torch():
    code = "import sys, time, cropr.data.layouts; from cropr.records import provenance; provenance(time.time())"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
