# Functions that the rules share: what a job is told, the digest of its code, the files it needs.
import hashlib
import shlex

from cropr.pruning.methods import REDUCERS
from cropr.tasks import TASKS
from workflow.paper.configuration import read_yaml
from workflow.paper.launch import launcher, resources, shares
from workflow.paper.sources import NOTEBOOK_MODULES, code_digest, shipped

CLAIMS = read_yaml(Path("config/claims.yaml"))["claims"]
JOBS = GRID.config.jobs
# Start of the commands that take long: the log of each attempt is kept, and failures of their own are not repeated.
RUN = "python -m workflow.paper.launch {resources.attempt} {log}"
# Weights in the repository that were made by the very run that would make them here.
SHIPPED = {
    run: file
    for run, file in GRID.shipped.items()
    if SETTINGS.pretrain == "shipped" and shipped(file, run)
}


def attempt(wildcards, attempt):
    """How often a job has been started, from 1."""
    return attempt


def text(value):
    """A specification, or a dictionary, as JSON."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True)


def digest(value):
    """What Snakemake compares of a long value: it prints both sides of a change."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:10]


def run_code(verb, spec):
    """Digest of the code behind a job that trains a model or shows its pruning maps."""
    task = TASKS[spec.task]
    shown = task.show if verb == "show" else None
    return code_digest(
        f"cropr.cli.{verb}", task.run, shown, REDUCERS[spec.prune.reducer].path
    )


def bench_code(spec):
    """Digest of the code behind a measurement of throughput."""
    heads = "cropr.bench.heads" if spec.detector else None
    return code_digest("cropr.cli.bench", heads, REDUCERS[spec.prune.reducer].path)


def microbench_verb(spec):
    """Module and verb of a microbenchmark or a plan."""
    if hasattr(spec, "measure"):
        return f"workflow.paper.microbench {spec.measure}"
    return "cropr plan"


def microbench_code(spec):
    """Digest of the code behind a microbenchmark or a plan."""
    cells = getattr(spec, "cells", None)
    verb = "workflow.paper.microbench.__main__" if cells else "cropr.cli.plan"
    return code_digest(verb, cells, REDUCERS["cropr"].path)


def images(wildcards):
    """The generated or downloaded images of a run; a folder of the user's is not watched."""
    source = GRID.source(wildcards.run)
    return (
        {"data": f"{source.folder}/record.json"}
        if source.scenes or source.public
        else {}
    )


def train_inputs(wildcards):
    """The images, and the weights to start from and of a teacher if a run makes them."""
    spec, made = GRID.spec(wildcards.run), images(wildcards)
    for key, run in (("init", spec.init), ("teacher", spec.teacher)):
        if run in GRID.pretrains:
            made[key] = f"{OUT}/pretrain/{run}/weights.safetensors"
        if run in GRID.runs:
            made[key] = f"{OUT}/runs/{run}/seed{wildcards.seed}/weights.safetensors"
    return made


def init_flag(wildcards, input):
    """Flags that name the weights to start from and those of a teacher."""
    return " ".join(
        f"--{key} {input[key]}" for key in ("init", "teacher") if key in input.keys()
    )


def notebook_inputs(wildcards):
    """Records, and the published numbers that the notebook asks for by name."""
    text = Path(f"notebooks/{wildcards.artefact}.ipynb").read_text(encoding="utf-8")
    published = sorted(Path("config/published").glob("*.csv"))
    wanted = [
        str(file) for file in published if rf"load_published(\"{file.stem}\"" in text
    ]
    return GRID.files(wildcards.artefact) + wanted


def claims_about(artefact):
    """Digest of the claims that a notebook decides: the others do not rerun it."""
    return digest([claim for claim in CLAIMS if claim.get("artefact") == artefact])


def compare_inputs(wildcards):
    """Training records of the row that the configuration names, and of its baseline."""
    if COMPARE is None:
        rows = ", ".join(GRID.comparable())
        raise WorkflowError(
            f"compare needs a row: --config row=...; choose one of {rows}"
        )
    artefact = GRID.artefacts[COMPARE[0]]
    rows = (artefact[artefact.config.baseline], artefact[COMPARE[1]])
    return {
        "manifest": f"{OUT}/manifests/{artefact.name}.json",
        "records": [record for row in rows for record in row.records],
    }
