"""Stands in for the notebook runner."""

import argparse
import json
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("source")
for flag in ("params", "executed", "notebook", "html"):
    parser.add_argument(f"--{flag}")
args = parser.parse_args()
parameters = json.loads(args.params)
for row in json.loads(Path(parameters["manifest"]).read_text())["rows"]:
    assert all(Path(record).exists() for record in row["records"])
tables = [Path(parameters["results"], "tables", Path(args.source).stem + end) for end in (".csv", ".md")]
for file in (args.executed, args.notebook, args.html, *tables):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("{}")
