# Functions that the rules share: which files a job needs.


def shipped_file(digest):
    """Weights in the repository that were made by this very run; None where they have to be made here."""
    file = GRID.pretrains[digest].shipped
    if SETTINGS.pretrain == "shipped" and file and shipped(file, digest):
        return file
    return None


SHIPPED = {digest: file for digest in GRID.pretrains if (file := shipped_file(digest))}


def images(source):
    """What says that the images are there, where they are generated; a folder of the user's is not watched."""
    return {"data": f"{source.folder}/record.json"} if source.scenes else {}


def data_inputs(wildcards):
    """Images of a run."""
    return images(GRID.source(wildcards.run))


def train_inputs(wildcards):
    """The images, and the weights to start from where they do not come from timm."""
    source = GRID.source(wildcards.run)
    inputs = images(source)
    if source.pretrain:
        inputs["init"] = (
            f"{OUT}/pretrain/{source.pretrain.digest()}/weights.safetensors"
        )
    return inputs


def run_code(verb, spec):
    """Digest of the sources behind a job that trains or shows a model."""
    task = TASKS[spec.task]
    found = task.view if verb == "show" else task.run
    reducer = REDUCERS[spec.prune.reducer].module
    return code_digest(f"cropr.cli.{verb}", found.partition(":")[0], reducer)


def bench_code(spec):
    """Digest of the sources behind a row's throughput."""
    heads = "cropr.bench.heads" if spec.detector else None
    return code_digest(
        "cropr.cli.bench", heads, REDUCERS[spec.prune.reducer].module
    )


def lab_verb(spec):
    """Command of a measurement of the laboratory, up to its specification."""
    if isinstance(spec, PlanSpec):
        return "plan"
    return f"lab {spec.measure}"


def lab_code(spec):
    """Digest of the sources behind such a measurement."""
    reducer = REDUCERS["cropr"].module
    if isinstance(spec, PlanSpec):
        return code_digest("cropr.cli.plan", reducer)
    return code_digest("cropr.cli.lab", spec.cells.partition(":")[0], reducer)


def notebook_inputs(wildcards):
    """Records and published numbers."""
    files = GRID.files(wildcards.artefact)
    if GRID.artefacts[wildcards.artefact].published:
        files.append(GRID.artefacts[wildcards.artefact].published)
    return files


def claims_about(artefact):
    """What the notebook decides: only its own part of the file reruns it."""
    claims = read_yaml(Path(CLAIMS))["claims"]
    return digest([claim for claim in claims if claim.get("artefact") == artefact])


def digest(manifest):
    """What Snakemake compares of a manifest: it prints both sides of what has changed, and manifests are long."""
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:10]


def compared(artefact, row):
    """Manifest of a row and its baseline alone."""
    return GRID.manifest(artefact, {row, GRID.artefacts[artefact].baseline})


def compare_inputs(wildcards):
    """Training records of the row that the configuration names, and of its baseline."""
    if COMPARE is None:
        raise WorkflowError(
            f"compare needs a row: --config row=...; choose one of {', '.join(GRID.comparable())}"
        )
    artefact, row = COMPARE
    return {
        "manifest": f"{OUT}/compare/{artefact}/{row}.json",
        "records": [
            record
            for entry in compared(artefact, row)["rows"]
            for record in entry["records"]
        ],
    }
