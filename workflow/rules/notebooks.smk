# A manifest tells a notebook where its records lie; papermill runs it; one page joins them all.


rule manifest:
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
        # A failed notebook stays here with its traceback; outputs of a failed job are deleted, logs are not.
        executed=f"{LOGS}/notebooks/{{artefact}}.ipynb",
    priority: SHORT
    conda:
        "../../envs/report.yaml"
    params:
        values=lambda wildcards, input: json.dumps(
            {"manifest": input.manifest, "results": OUT}
        ),
        code=code_digest("workflow.paper.run_notebook", "workflow.paper.display", "workflow.paper.lab_display"),
        claims=lambda wildcards: claims_about(wildcards.artefact),
    message:
        "Running notebook {wildcards.artefact} (log: {log.text})"
    shell:
        "python -m workflow.paper.run_notebook {input.notebook} --params {params.values:q} --executed {log.executed}"
        " --notebook {output.notebook} --html {output.page} > {log.text} 2>&1"


rule report:
    input:
        pages=expand(f"{OUT}/notebooks/{{artefact}}.html", artefact=GRID.artefacts),
        manifests=expand(f"{OUT}/manifests/{{artefact}}.json", artefact=GRID.artefacts),
        claims=CLAIMS,
    output:
        page=report(REPORT, caption="../report/report.rst", category="Report"),
        claims=f"{OUT}/tables/claims.md",
    log:
        f"{LOGS}/report.log",
    conda:
        "../../envs/report.yaml"
    params:
        code=code_digest("workflow.paper.page"),
    message:
        "Joining everything in {output.page} (log: {log})"
    shell:
        "python -m workflow.paper.page --manifests {input.manifests} --out {output.page}"
        " --claims-table {output.claims} > {log} 2>&1"


# `snakemake imagenet_methods` makes one table or figure.
for name in GRID.artefacts:

    rule:
        name:
            name
        input:
            f"{OUT}/notebooks/{name}.html",
        localrule: True
