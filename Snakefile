# Reproduces the paper's tables and figures: data -> pretrain -> train -> bench -> maps -> notebooks -> report.
#
#   snakemake --cores all                                  everything, laptop scale
#   snakemake --cores all imagenet_methods                 one table or figure
#   snakemake --cores all --config scale=ci                does it run? minutes
#   snakemake --cores all --config seeds=3 row=no_mlp -- compare    one ablation beside its baseline
#
# What is run stands in config/; how, in workflow/rules/. A rule is one call of `python -m cropr`.

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from snakemake.settings.types import DeploymentMethod
from snakemake.utils import min_version

min_version("9.27")

sys.path.insert(0, workflow.basedir)

from workflow.paper.configuration import read_settings, read_yaml
from workflow.paper.grid import load_grid, shipped
from workflow.paper.sources import code_digest
from cropr.bench.specs import PlanSpec
from cropr.pruning.methods import REDUCERS
from cropr.tasks import TASKS


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
    SETTINGS = read_settings(config)
    GRID = load_grid(
        "config", SETTINGS.scale, SETTINGS.seeds, SETTINGS.roots, SETTINGS.overrides
    )
    COMPARE = GRID.find_row(SETTINGS.row) if SETTINGS.row else None
except (ValueError, FileNotFoundError) as error:
    raise WorkflowError(str(error))

OUT = GRID.results
LOGS = f"{OUT}/logs"
REPORT = f"{OUT}/report.html"
CLAIMS = "config/claims.yaml"
# None is named on a cluster, nor by calls that run nothing.
CORES = workflow.resource_settings.cores or 8
# Notebooks and what they draw take seconds and go before any run: whoever waits sees the first pictures early.
SHORT = 1000

# Jobs find the Python that runs Snakemake first, activated or not; with conda, theirs comes before it.
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
)


wildcard_constraints:
    run="[0-9a-f]{10}",
    bench="[0-9a-f]{10}",
    lab="[0-9a-f]{10}",
    seed=r"\d+",
    artefact="|".join(GRID.artefacts),
    layout="|".join(GRID.generated) or "none",
    row="[a-z0-9_.]+",


localrules:
    reproduce,
    manifest,
    compare_manifest,
    compare,
    report,


rule reproduce:
    default_target: True
    input:
        REPORT,


include: "workflow/rules/common.smk"


wildcard_constraints:
    shipped="|".join(SHIPPED) or "none",


include: "workflow/rules/runs.smk"
include: "workflow/rules/notebooks.smk"
include: "workflow/rules/compare.smk"


onsuccess:
    if Path(REPORT).is_file() and not COMPARE:
        print(f"Start reading here: {Path(REPORT).resolve()}")
