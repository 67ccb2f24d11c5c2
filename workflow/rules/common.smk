# Functions that the rules share: which files a job needs.

# The weights that the repository ships, where they were made by the very run that this scale asks for.
SHIPPED = None
if GRID.pretrain and SETTINGS.pretrain == "shipped" and GRID.config.pretrain.shipped:
    if shipped(GRID.config.pretrain.shipped, GRID.pretrain.digest()):
        SHIPPED = GRID.config.pretrain.shipped


def data_inputs(wildcards):
    """The images, where they are generated; a folder of the user's is not watched."""
    return {"data": f"{GRID.data}/record.json"} if GRID.scenes else {}


def train_inputs(wildcards):
    """The images, and the weights to start from where they do not come from timm."""
    inputs = data_inputs(wildcards)
    if GRID.pretrain:
        inputs["init"] = f"{OUT}/pretrain/{GRID.pretrain.digest()}/weights.safetensors"
    return inputs


def notebook_inputs(wildcards):
    """Records, published numbers, and the claims where there are any about the artefact."""
    artefact = wildcards.artefact
    files = GRID.files(artefact)
    if GRID.artefacts[artefact].published:
        files.append(GRID.artefacts[artefact].published)
    if any(
        claim.get("artefact") == artefact for claim in read_yaml(Path(CLAIMS))["claims"]
    ):
        files.append(CLAIMS)
    return files


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
