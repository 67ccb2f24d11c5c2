"""Stands in for ``python -m cropr`` and for microbenchmarks: every verb writes at once what the rule expects."""

import argparse
import json
import sys
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("verb", nargs="+")
for flag in ("out", "spec", "data", "seed", "init", "teacher", "threads", "workers", "run", "images", "layout"):
    parser.add_argument(f"--{flag}")
args = parser.parse_args()

verb, out = args.verb[0], Path(args.out)
microbenchmarks = ("sweep", "blocks", "profile", "scoring", "training")
assert verb in ("data", "train", "bench", "show", "plan", *microbenchmarks), verb
if verb == "show":
    assert Path(args.run, "weights.safetensors").exists()
    out.write_text("maps")
    sys.exit()
if args.init:
    assert Path(args.init).exists()
if verb == "train" and (out / "record.json").exists():
    sys.exit()  # like the real one: a finished run is not repeated
spec = json.loads(args.spec)
seed = int(args.seed or 0)
metrics = {"top1": 80.0 + seed + len(args.spec) % 5, "step_ms": 50.0, "loss": 0.5}
record = {"kind": verb, "spec": spec, "seed": seed, "metrics": metrics, "series": {}, "provenance": {}}
out.mkdir(parents=True, exist_ok=True)
(out / "record.json").write_text(json.dumps(record))
if verb == "train":
    (out / "weights.safetensors").write_text("weights")
