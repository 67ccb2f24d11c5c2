# Reproduces the paper's tables and figures: data -> pretrain -> train -> bench -> maps -> notebooks -> report.
#
#   snakemake --cores all                                  everything, laptop scale
#   snakemake --cores all imagenet_methods                 one table or figure
#   snakemake --cores all --config scale=ci                a test of every step, in minutes
#   snakemake --cores all --config seeds=3 row=no_mlp -- compare    one ablation and its baseline
#
# config/ says what is run, workflow/rules/ how. A rule is one call of `python -m cropr` or of a module of workflow/paper.

import json
import os
import shutil
import sys
from pathlib import Path

from snakemake.settings.types import DeploymentMethod
from snakemake.utils import min_version

min_version("9.27")

sys.path.insert(0, workflow.basedir)

from cropr.specs import check
from workflow.paper.configuration import Settings
from workflow.paper.grid import load_grid


configfile: "config/config.yaml"


if (
    DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    and not shutil.which("conda")
):
    raise WorkflowError(
        "--use-conda needs a program called conda (24.7.1 or newer) on PATH, and there is none. "
        "Without conda: make reproduce, or pip install -e '.[workflow]' and then snakemake --cores all"
    )

try:
    SETTINGS = check(Settings, config, "config/config.yaml")
    GRID = load_grid(
        "config", SETTINGS.scale, SETTINGS.seeds, SETTINGS.roots, SETTINGS.overrides
    )
    COMPARE = GRID.find_row(SETTINGS.row) if SETTINGS.row else None
except (ValueError, FileNotFoundError) as error:
    raise WorkflowError(str(error))

OUT = GRID.results
LOGS = f"{OUT}/logs"
REPORT = f"{OUT}/report.html"
# Snakemake knows no number of cores on a cluster, nor in calls that run nothing.
CORES = workflow.resource_settings.cores or 8
# Priority of jobs that take seconds: they run as soon as they can, so that the first pictures are there early.
SHORT = 1000

# Jobs use the Python that runs Snakemake, in an activated environment or not; with conda, the job's own comes first.
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
)


wildcard_constraints:
    run="[0-9a-f]{10}",
    bench="[0-9a-f]{10}",
    seed=r"\d+",
    artefact="|".join(GRID.artefacts),
    layout="|".join(GRID.generated) or "none",


localrules:
    reproduce,
    manifest,
    compare,
    report,


rule reproduce:
    default_target: True
    input:
        REPORT,


include: "workflow/rules/common.smk"
include: "workflow/rules/runs.smk"
include: "workflow/rules/notebooks.smk"


onsuccess:
    if Path(REPORT).is_file() and not COMPARE:
        print(f"Start reading here: {Path(REPORT).resolve()}")
