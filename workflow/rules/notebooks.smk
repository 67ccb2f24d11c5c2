# A manifest tells a notebook where its records lie; papermill runs the notebook; one page joins them all.


# `params` hold what it writes; its YAML is an input so that --rerun-triggers mtime sees new rows, too.
rule manifest:
    input:
        "config/experiments/{artefact}.yaml",
    output:
        f"{OUT}/manifests/{{artefact}}.json",
    log:
        f"{LOGS}/manifests/{{artefact}}.log",
    priority: SHORT
    conda:
        "../../envs/report.yaml"
    params:
        digest=lambda wildcards: digest(GRID.manifest(wildcards.artefact)),
        text=lambda wildcards, output: json.dumps(
            GRID.manifest(wildcards.artefact), indent=1
        ),
    message:
        "Listing the rows of {wildcards.artefact}"
    shell:
        "printf '%s\n' {params.text:q} > {output} 2> {log}"


rule notebook:
    input:
        notebook_inputs,
        manifest=f"{OUT}/manifests/{{artefact}}.json",
        notebook="notebooks/{artefact}.ipynb",
    output:
        csv=f"{OUT}/tables/{{artefact}}.csv",
        markdown=f"{OUT}/tables/{{artefact}}.md",
        notebook=f"{OUT}/notebooks/{{artefact}}.ipynb",
        page=report(
            f"{OUT}/notebooks/{{artefact}}.html",
            caption="../report/notebook.rst",
            category="Notebooks",
            labels={"artefact": "{artefact}"},
        ),
    log:
        text=f"{LOGS}/notebooks/{{artefact}}.log",
        # A failed notebook stays here with its traceback: Snakemake deletes outputs of a failed job, but no logs.
        executed=f"{LOGS}/notebooks/{{artefact}}.ipynb",
    priority: SHORT
    conda:
        "../../envs/report.yaml"
    params:
        values=json.dumps({"results": OUT}),
        code=code_digest(*NOTEBOOK_MODULES),
        claims=lambda wildcards: claims_about(wildcards.artefact),
    message:
        "Running notebook {wildcards.artefact} (log: {log.text})"
    shell:
        "python -m workflow.paper.run_notebook {input.notebook} --params {params.values:q} --executed {log.executed}"
        " --notebook {output.notebook} --html {output.page} > {log.text} 2>&1"


rule report:
    input:
        expand(f"{OUT}/notebooks/{{artefact}}.html", artefact=GRID.artefacts),
        expand(f"{OUT}/manifests/{{artefact}}.json", artefact=GRID.artefacts),
        "config/claims.yaml",
        "workflow/report/report.html.j2",
    output:
        page=report(REPORT, caption="../report/report.rst", category="Report"),
        tables=expand(
            f"{OUT}/tables/{{name}}", name=["claims.md", "claims.csv", "headline.md"]
        ),
    log:
        f"{LOGS}/report.log",
    conda:
        "../../envs/report.yaml"
    params:
        code=code_digest("workflow.paper.page"),
    message:
        "Joining everything in {output.page} (log: {log})"
    shell:
        "python -m workflow.paper.page --results "
        + OUT
        + " --out {output.page} --artefacts "
        + " ".join(GRID.artefacts)
        + " > {log} 2>&1"


# `snakemake imagenet_methods` makes one table or figure.
for name in GRID.artefacts:

    rule:
        name:
            name
        input:
            f"{OUT}/notebooks/{name}.html",
        localrule: True


# One row and its baseline: snakemake --cores all --config seeds=3 row=ablations/no_mlp -- compare
# Its runs are those of the whole table. Without an output, the rule prints in every call.
rule compare:
    input:
        unpack(compare_inputs),
    log:
        f"{LOGS}/compare.log",
    conda:
        "../../envs/report.yaml"
    params:
        row=COMPARE[1] if COMPARE else "",
    message:
        "{params.row} and its baseline"
    shell:
        "python -m workflow.paper.compare --manifest {input.manifest} --row {params.row} 2>&1 | tee {log}"
