"""How a job is started: its processes on GPUs and nodes, its log, and whether a retry may repeat it.

    python -m workflow.paper.launch NUMBER LOG COMMAND ...

The log of an earlier attempt is kept as ``LOG.1``, ``LOG.2``. A command that a signal ended (a time limit, a lost node)
is repeated; one that failed by itself is not: the next attempt ends at once with the same status.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workflow.paper.configuration import JobsBlock

REPEATED = (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGKILL)
"""Exit statuses of commands that a signal ended, in addition to negative ones."""


def launcher(jobs: JobsBlock) -> str:
    """Start of the command of a training run, up to ``-m``."""
    processes = f"python -m torch.distributed.run --nproc-per-node {jobs.gpus}"
    if jobs.nodes > 1:
        if not jobs.gpus:
            raise ValueError(f"jobs.nodes = {jobs.nodes} without jobs.gpus: on the CPU a run has one node")
        host = "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1):$((20000 + SLURM_JOB_ID % 20000))"
        meet = f"--nnodes {jobs.nodes} --rdzv-id $SLURM_JOB_ID --rdzv-backend c10d --rdzv-endpoint {host}"
        return f"srun --nodes {jobs.nodes} --ntasks-per-node 1 {processes} {meet}"
    return f"{processes} --standalone" if jobs.gpus > 1 else "python"


def shares(jobs: JobsBlock, threads: int) -> str:
    """Flags that divide the threads of a node among its processes. On a GPU, all but one of them decode images."""
    own = max(1, threads // max(1, jobs.gpus))
    return f"--threads {own} --workers {(own - 1) * bool(jobs.gpus)}"


def resources(jobs: JobsBlock) -> dict[str, int | str]:
    """Of a whole run, as Snakemake and its SLURM plugin read them."""
    several: dict[str, int | str] = {"nodes": jobs.nodes, "tasks": jobs.nodes, "mpi": "srun"} if jobs.nodes > 1 else {}
    return {"gpu": jobs.gpus * jobs.nodes, **several}


def main(number: int, log: Path, command: list[str]) -> int:
    """Run ``command`` as attempt ``number``, which counts from 1; its exit status."""
    failed = log.with_name(f"{log.name}.failed")
    if number > 1 and failed.exists():
        sys.stderr.write(f"not repeated: the attempt before failed by itself; see {log}\n")
        return int(failed.read_text())
    failed.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    if number > 1 and log.exists():
        log.replace(log.with_name(f"{log.name}.{number - 1}"))
    stopped: list[int] = []
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:

        def forward(received: int, _: object) -> None:
            stopped.append(received)
            process.send_signal(received)

        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, forward)
        status = process.wait()
    if status > 0 and not stopped and status not in REPEATED:
        failed.write_text(str(status))
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
