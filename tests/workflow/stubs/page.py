"""Stands in for the report's page."""

import argparse
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--manifests", nargs="+")
parser.add_argument("--out")
args = parser.parse_args()
Path(args.out).write_text("report")
