# Data, weights, training runs, throughput, pruning maps: every job that leaves a record.
#
# `params` hold the job's specification and the digest of its code, so that a change reruns the jobs that it concerns.
# Values that a command needs beside them are functions of `output`, which Snakemake does not compare: the names of rows
# and the place of the images rerun nothing.


wildcard_constraints:
    shipped="|".join(SHIPPED) or "none",


# Weights that cost days are not overwritten by accident.
kept = protected if GRID.scale == "paper" else str


# Shipped weights are not trained again; --config pretrain=make does not use them.
ruleorder: shipped > pretrain


rule data:
    output:
        f"{OUT}/data/{{layout}}/record.json",
    log:
        f"{LOGS}/data/{{layout}}.log",
    priority: lambda wildcards: GRID.priority(wildcards.layout)
    conda:
        "../../envs/train.yaml"
    threads: 1
    params:
        spec=lambda wildcards: text(GRID.generated[wildcards.layout]),
        code=code_digest("cropr.cli.data:_scenes"),
    message:
        "Generating images, layout {wildcards.layout} (log: {log})"
    shell:
        "python -m cropr data scenes --layout {wildcards.layout} --out $(dirname {output}) --spec {params.spec:q}"
        " --workers {threads} > {log} 2>&1"


for name, layouts in GRID.public.items():

    rule:
        name:
            f"download_{name}"
        output:
            expand(f"{OUT}/data/{{layout}}/record.json", layout=layouts),
        log:
            f"{LOGS}/data/{name}.log",
        priority: SHORT
        conda:
            "../../envs/train.yaml"
        params:
            name=name,
            code=code_digest("cropr.cli.data:_public"),
            source=lambda wildcards, output: (
                f"--source {shlex.quote(str(SETTINGS.source))}"
                if SETTINGS.source
                else ""
            ),
        message:
            "Downloading the images of {params.name}, or reading their archives (log: {log})"
        shell:
            "python -m cropr data {params.name} --out $(dirname $(dirname {output[0]})) {params.source} > {log} 2>&1"


rule shipped:
    input:
        lambda wildcards: SHIPPED[wildcards.shipped],
    output:
        f"{OUT}/pretrain/{{shipped}}/weights.safetensors",
    log:
        f"{LOGS}/pretrain/{{shipped}}.log",
    priority: SHORT
    conda:
        "../../envs/train.yaml"
    message:
        "Taking the pretrained weights that the repository ships ({input})"
    shell:
        "cp {input} {output} > {log} 2>&1"


rule pretrain:
    input:
        unpack(train_inputs),
    output:
        weights=kept(f"{OUT}/pretrain/{{run}}/weights.safetensors"),
        # As an output, it is deleted before the job runs again: a run that finds its record does nothing.
        record=f"{OUT}/pretrain/{{run}}/record.json",
    log:
        f"{LOGS}/pretrain/{{run}}.log",
    priority: lambda wildcards: GRID.priority(wildcards.run)
    conda:
        "../../envs/train.yaml"
    threads: CORES
    resources:
        **resources(JOBS),
        attempt=attempt,
    params:
        launch=lambda wildcards, output: launcher(JOBS),
        shares=lambda wildcards, output, threads: shares(JOBS, threads),
        spec=lambda wildcards: text(GRID.pretrains[wildcards.run]),
        code=lambda wildcards: run_code("train", GRID.pretrains[wildcards.run]),
        data=lambda wildcards, output: GRID.source(wildcards.run).folder,
        init=init_flag,
    message:
        "Making the pretrained weights {wildcards.run} (log: {log})"
    shell:
        RUN
        + " {params.launch} -m cropr train --spec {params.spec:q} --data {params.data:q}"
        " --seed 0 --out $(dirname {output.record}) {params.init} {params.shares}"


rule train:
    input:
        unpack(train_inputs),
    output:
        record=f"{OUT}/runs/{{run}}/seed{{seed}}/record.json",
        weights=kept(f"{OUT}/runs/{{run}}/seed{{seed}}/weights.safetensors"),
    log:
        f"{LOGS}/train/{{run}}-seed{{seed}}.log",
    priority: lambda wildcards: GRID.priority(wildcards.run, int(wildcards.seed))
    conda:
        "../../envs/train.yaml"
    threads: JOBS.threads
    resources:
        **resources(JOBS),
        attempt=attempt,
    params:
        launch=lambda wildcards, output: launcher(JOBS),
        shares=lambda wildcards, output, threads: shares(JOBS, threads),
        spec=lambda wildcards: text(GRID.runs[wildcards.run]),
        code=lambda wildcards: run_code("train", GRID.runs[wildcards.run]),
        data=lambda wildcards, output: GRID.source(wildcards.run).folder,
        row=lambda wildcards, output: GRID.names[wildcards.run],
        init=init_flag,
    message:
        "Training {params.row}, seed {wildcards.seed} (log: {log})"
    shell:
        RUN
        + " {params.launch} -m cropr train --spec {params.spec:q} --data {params.data:q}"
        " --seed {wildcards.seed} --out $(dirname {output.record}) {params.init} {params.shares}"


# It takes all cores, so that nothing runs beside a measurement. Without a priority it runs after all training, so that
# accuracies and maps do not wait for it.
rule bench:
    output:
        f"{OUT}/bench/{{bench}}/record.json",
    log:
        f"{LOGS}/bench/{{bench}}.log",
    conda:
        "../../envs/train.yaml"
    threads: CORES
    resources:
        attempt=attempt,
        gpu=min(JOBS.gpus, 1),
    params:
        spec=lambda wildcards: text(GRID.benches[wildcards.bench]),
        code=lambda wildcards: bench_code(GRID.benches[wildcards.bench]),
        verb="cropr bench",
        row=lambda wildcards, output: GRID.names[wildcards.bench],
    message:
        "Measuring throughput of {params.row} (log: {log})"
    shell:
        RUN
        + " python -m {params.verb} --spec {params.spec:q} --out $(dirname {output})"


# Not `use rule bench`: Snakemake applies a profile's resources and threads to no rule that is made that way.
rule microbench:
    output:
        f"{OUT}/microbench/{{bench}}/record.json",
    log:
        f"{LOGS}/microbench/{{bench}}.log",
    conda:
        "../../envs/train.yaml"
    threads: CORES
    resources:
        attempt=attempt,
        gpu=min(JOBS.gpus, 1),
    params:
        spec=lambda wildcards: text(GRID.microbenches[wildcards.bench]),
        code=lambda wildcards: microbench_code(GRID.microbenches[wildcards.bench]),
        verb=lambda wildcards: microbench_verb(GRID.microbenches[wildcards.bench]),
        row=lambda wildcards, output: GRID.names[wildcards.bench],
    message:
        "Measuring {params.row} (log: {log})"
    shell:
        RUN
        + " python -m {params.verb} --spec {params.spec:q} --out $(dirname {output})"


rule maps:
    input:
        unpack(images),
        weights=f"{OUT}/runs/{{run}}/seed{{seed}}/weights.safetensors",
        record=f"{OUT}/runs/{{run}}/seed{{seed}}/record.json",
    output:
        f"{OUT}/maps/{{run}}/seed{{seed}}.npz",
    log:
        f"{LOGS}/maps/{{run}}-seed{{seed}}.log",
    priority: SHORT
    conda:
        "../../envs/train.yaml"
    params:
        images=GRID.config.maps,
        code=lambda wildcards: run_code("show", GRID.runs[wildcards.run]),
        data=lambda wildcards, output: GRID.source(wildcards.run).folder,
        row=lambda wildcards, output: GRID.names[wildcards.run],
    message:
        "Saving pruning maps of {params.row} (log: {log})"
    shell:
        "python -m cropr show --run $(dirname {input.record}) --data {params.data:q} --images {params.images}"
        " --out {output} > {log} 2>&1"
