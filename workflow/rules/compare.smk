# One row beside its baseline, and nothing else: snakemake --cores all --config seeds=3 row=ablations/no_mlp -- compare
#
# The runs are those of the whole table, under the same names: nothing is computed twice.


rule compare_manifest:
    output:
        f"{OUT}/compare/{{artefact}}/{{row}}.json",
    log:
        f"{LOGS}/compare/{{artefact}}/{{row}}.log",
    conda:
        "../../envs/report.yaml"
    params:
        digest=lambda wildcards: digest(compared(wildcards.artefact, wildcards.row)),
        text=lambda wildcards, output: json.dumps(
            compared(wildcards.artefact, wildcards.row), indent=1
        ),
    message:
        "Listing {wildcards.row} and its baseline"
    shell:
        "printf '%s\n' {params.text:q} > {output} 2> {log}"


# No output: it prints, every time.
rule compare:
    input:
        unpack(compare_inputs),
    log:
        f"{LOGS}/compare.log",
    conda:
        "../../envs/report.yaml"
    params:
        row=lambda wildcards: COMPARE[1] if COMPARE else "",
    message:
        "{params.row} beside its baseline"
    shell:
        "python -m workflow.paper.compare --manifest {input.manifest} --row {params.row} 2>&1 | tee {log}"
