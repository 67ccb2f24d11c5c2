#!/usr/bin/env python3
"""A stand-in for conda: makes a virtual environment that sees the packages of the Python that runs the tests.

It shows that the wiring holds (env files, activation, kernels, no PYTHONPATH), NOT that the specs solve. Answers what
Snakemake 9.27 asks, and notes every call in calls.log beside itself.
"""

import json
import os
import site
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUTER = Path(os.environ["STAND_IN_OUTER"])
ACTIVATE = """
export CONDA_PREFIX="$1"
export PATH="$1/bin:$PATH"
export JUPYTER_PATH="{outer}/share/jupyter"
"""


def main(arguments: list[str]) -> int:
    with (HERE / "calls.log").open("a") as log:
        log.write(" ".join(arguments) + "\n")
    if arguments[:1] == ["info"]:
        (HERE / "bin").mkdir(exist_ok=True)
        (HERE / "bin/activate").write_text(ACTIVATE.format(outer=OUTER))
        sys.stdout.write(json.dumps({"conda_prefix": str(HERE), "platform": "linux-64"}))
    elif arguments == ["--version"]:
        sys.stdout.write("conda 24.7.1\n")
    elif arguments[:2] == ["config", "--get"]:
        sys.stdout.write(json.dumps({"get": {"channel_priority": "strict"}}))
    elif arguments[:2] == ["env", "create"]:
        prefix = Path(arguments[arguments.index("--prefix") + 1])
        assert Path(arguments[arguments.index("--file") + 1]).exists()
        venv.create(prefix, symlinks=True)
        packages = next(prefix.glob("lib/python*/site-packages"))
        outer = [path for path in sys.path if path.endswith("site-packages")] or site.getsitepackages()
        (packages / "outer.pth").write_text("\n".join(outer) + "\n")
        (prefix / "conda-meta").mkdir()
        (prefix / "conda-meta/history").write_text("")
    elif arguments[:1] != ["clean"]:
        sys.stderr.write(f"the stand-in does not know: conda {' '.join(arguments)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
