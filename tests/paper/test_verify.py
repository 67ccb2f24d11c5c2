"""Tables are checked against their records, and cells are led back to them."""

from __future__ import annotations

import json
from pathlib import Path

from synthetic import run_cells, write_results

from cropr.specs import ModelSpec
from cropr.tasks import TrainSpec
from workflow.paper.verify import sources, wrong_record, wrong_tables


def test_a_table_that_does_not_follow_from_its_records_is_named(tmp_path: Path) -> None:
    results = write_results(tmp_path, "ablations")
    run_cells("ablations", results)
    assert list(wrong_tables(["ablations"], results, run_cells)) == []
    path = sources("ablations", results)["no_mlp"][0]
    record = json.loads(path.read_text())
    record["metrics"]["top1"] += 5
    path.write_text(json.dumps(record))
    assert "ablations.csv: does not follow" in next(wrong_tables(["ablations"], results, run_cells))


def test_a_record_has_the_id_of_its_specification(tmp_path: Path) -> None:
    spec = TrainSpec(model=ModelSpec(name="vit_tiny_patch16_224"), data={"num_classes": 3})
    path = tmp_path / spec.digest() / "record.json"
    path.parent.mkdir()
    record = {"kind": "train", "id": spec.digest(), "spec": spec.model_dump(mode="json")}
    path.write_text(json.dumps(record))
    assert wrong_record(path) is None
    record["spec"]["recipe"]["epochs"] = 3
    path.write_text(json.dumps(record))
    assert "its specification has the id" in str(wrong_record(path))
