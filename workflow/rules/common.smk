# Functions that the rules share: what a job is told, the digest of its code, the files it needs.
import hashlib

from cropr.pruning.methods import REDUCERS
from cropr.tasks import TASKS
from workflow.paper.configuration import read_yaml
from workflow.paper.sources import NOTEBOOK_MODULES, code_digest, shipped

CLAIMS = read_yaml(Path("config/claims.yaml"))["claims"]
# Weights in the repository that were made by the very run that would make them here.
SHIPPED = {
    run: file
    for run, file in GRID.shipped.items()
    if SETTINGS.pretrain == "shipped" and shipped(file, run)
}


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
    found = task.show if verb == "show" else task.run
    return code_digest(f"cropr.cli.{verb}", found, REDUCERS[spec.prune.reducer].path)


def bench_code(spec):
    """Digest of the code behind a measurement of throughput."""
    heads = "cropr.bench.heads" if spec.detector else None
    return code_digest("cropr.cli.bench", heads, REDUCERS[spec.prune.reducer].path)


def microbench_verb(spec):
    """Command of a microbenchmark or a plan, up to its specification."""
    return f"microbench {spec.measure}" if hasattr(spec, "measure") else "plan"


def microbench_code(spec):
    """Digest of the code behind a microbenchmark or a plan."""
    verb, cells = microbench_verb(spec).split()[0], getattr(spec, "cells", None)
    return code_digest(f"cropr.cli.{verb}", cells, REDUCERS["cropr"].path)


def images(wildcards):
    """The generated or downloaded images of a run; a folder of the user's is not watched."""
    source = GRID.source(wildcards.run)
    return (
        {"data": f"{source.folder}/record.json"}
        if source.scenes or source.public
        else {}
    )


def train_inputs(wildcards):
    """The images, and the weights to start from if a run makes them."""
    init = GRID.spec(wildcards.run).init
    made = {"init": f"{OUT}/pretrain/{init}/weights.safetensors"}
    return images(wildcards) | (made if init in GRID.pretrains else {})


def init_flag(wildcards, input):
    """Flag that names the weights to start from."""
    return f"--init {input.init}" if "init" in input.keys() else ""


def notebook_inputs(wildcards):
    """Records and published numbers."""
    published = GRID.artefacts[wildcards.artefact].published
    return GRID.files(wildcards.artefact) + ([published] if published else [])


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
