# Data, weights, training runs, throughput, pruning maps: everything that leaves a record.
#
# `params` hold the job's own specification and the digest of the source files behind it, and nothing else: so a change
# reruns what it concerns. What else a command needs is a function of `output`: Snakemake does not compare such values, so
# names for people and the place of the images rerun nothing.


# Shipped weights are not made again; --config pretrain=make knows of none.
ruleorder: shipped > pretrain


rule data:
    output:
        f"{OUT}/data/{{layout}}/record.json",
    log:
        f"{LOGS}/data/{{layout}}.log",
    priority: 1000
    conda:
        "../../envs/train.yaml"
    threads: CORES
    params:
        spec=lambda wildcards: json.dumps(
            GRID.generated[wildcards.layout].model_dump(mode="json"), sort_keys=True
        ),
        code=code_digest("cropr.cli.data"),
    message:
        "Generating images, layout {wildcards.layout} (log: {log})"
    shell:
        "python -m cropr data scenes --layout {wildcards.layout} --out $(dirname {output}) --spec {params.spec:q}"
        " --workers {threads} > {log} 2>&1"


rule shipped:
    input:
        lambda wildcards: SHIPPED[wildcards.shipped],
    output:
        f"{OUT}/pretrain/{{shipped}}/weights.safetensors",
    log:
        f"{LOGS}/pretrain/{{shipped}}.log",
    priority: 1000
    conda:
        "../../envs/train.yaml"
    message:
        "Taking the pretrained weights that the repository ships ({input})"
    shell:
        "cp {input} {output} > {log} 2>&1"


rule pretrain:
    input:
        unpack(data_inputs),
    output:
        weights=f"{OUT}/pretrain/{{run}}/weights.safetensors",
        # Must go before the job runs again: a run that finds its record takes itself for finished.
        record=f"{OUT}/pretrain/{{run}}/record.json",
    log:
        f"{LOGS}/pretrain/{{run}}.log",
    priority: 1000
    conda:
        "../../envs/train.yaml"
    threads: CORES
    resources:
        gpu=GRID.config.jobs.gpus,
    params:
        spec=lambda wildcards: json.dumps(
            GRID.source(wildcards.run).pretrain.model_dump(mode="json"),
            sort_keys=True,
        ),
        code=lambda wildcards: run_code("train", GRID.pretrains[wildcards.run].pretrain),
        data=lambda wildcards, output: GRID.source(wildcards.run).folder,
        task=lambda wildcards, output: GRID.source(wildcards.run).pretrain.task,
    message:
        "Making the pretrained weights for {params.task} (log: {log})"
    shell:
        "python -m cropr train --spec {params.spec:q} --data {params.data:q} --seed 0"
        " --out $(dirname {output.record}) --threads {threads} > {log} 2>&1"


rule train:
    input:
        unpack(train_inputs),
    output:
        record=f"{OUT}/runs/{{run}}/seed{{seed}}/record.json",
        weights=f"{OUT}/runs/{{run}}/seed{{seed}}/weights.safetensors",
    log:
        f"{LOGS}/train/{{run}}-seed{{seed}}.log",
    priority: lambda wildcards: GRID.priority(wildcards.run)
    conda:
        "../../envs/train.yaml"
    threads: GRID.config.jobs.threads
    resources:
        gpu=GRID.config.jobs.gpus,
    params:
        spec=lambda wildcards: json.dumps(
            GRID.runs[wildcards.run].model_dump(mode="json"), sort_keys=True
        ),
        code=lambda wildcards: run_code("train", GRID.runs[wildcards.run]),
        data=lambda wildcards, output: GRID.source(wildcards.run).folder,
        row=lambda wildcards, output: GRID.names[wildcards.run],
        init=lambda wildcards, input: (
            f"--init {input.init}" if "init" in input.keys() else ""
        ),
    message:
        "Training {params.row}, seed {wildcards.seed} (log: {log})"
    shell:
        "python -m cropr train --spec {params.spec:q} --data {params.data:q} --seed {wildcards.seed}"
        " --out $(dirname {output.record}) {params.init} --threads {threads} > {log} 2>&1"


# All cores: nothing else may run beside a measurement. Without a priority it comes last, when no run holds a core any more:
# the machine is quiet then, and accuracies and maps do not wait for it.
rule bench:
    output:
        f"{OUT}/bench/{{bench}}/record.json",
    log:
        f"{LOGS}/bench/{{bench}}.log",
    conda:
        "../../envs/train.yaml"
    threads: CORES
    resources:
        gpu=GRID.config.jobs.gpus,
    params:
        spec=lambda wildcards: json.dumps(
            GRID.benches[wildcards.bench].model_dump(mode="json"), sort_keys=True
        ),
        code=lambda wildcards: bench_code(GRID.benches[wildcards.bench]),
        row=lambda wildcards, output: GRID.names[wildcards.bench],
    message:
        "Measuring throughput of {params.row} (log: {log})"
    shell:
        "python -m cropr bench --spec {params.spec:q} --out $(dirname {output}) > {log} 2>&1"


# Like bench: alone on the machine, at the end.
rule lab:
    output:
        f"{OUT}/lab/{{lab}}/record.json",
    log:
        f"{LOGS}/lab/{{lab}}.log",
    conda:
        "../../envs/train.yaml"
    threads: CORES
    resources:
        gpu=GRID.config.jobs.gpus,
    params:
        spec=lambda wildcards: json.dumps(
            GRID.labs[wildcards.lab].model_dump(mode="json"), sort_keys=True
        ),
        verb=lambda wildcards: lab_verb(GRID.labs[wildcards.lab]),
        code=lambda wildcards: lab_code(GRID.labs[wildcards.lab]),
        row=lambda wildcards, output: GRID.names[wildcards.lab],
    message:
        "Measuring {params.row} (log: {log})"
    shell:
        "python -m cropr {params.verb} --spec {params.spec:q} --out $(dirname {output}) > {log} 2>&1"


rule maps:
    input:
        unpack(data_inputs),
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
