"""Stands in for the report's page."""

import argparse
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--manifests", nargs="+")
parser.add_argument("--out")
parser.add_argument("--claims-table")
args = parser.parse_args()
Path(args.out).write_text("report")
Path(args.claims_table).write_text("claims")
