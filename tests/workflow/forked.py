"""Runs the jobs of a whole scale without importing torch in each, which takes longer than most of them.

A copy of this file stands in for ``cropr/__main__.py``. The first job of every verb, and all that write data, run as
they do for users. Later ones are handed to a process that has imported everything and forks itself for each.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

SOCKET = Path("jobs.socket")
FORKED = ("train", "bench", "microbench", "plan", "show")


@contextlib.contextmanager
def forked(repository: Path) -> Iterator[None]:
    """In this copy of the repository, ``python -m cropr`` forks meanwhile."""
    (repository / "cropr/__main__.py").write_text(Path(__file__).read_text())
    server = subprocess.Popen([sys.executable, "-m", "cropr", "serve"], cwd=repository)
    try:
        while not (repository / SOCKET).exists():
            assert server.poll() is None
            time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait()


def main(argv: list[str]) -> int:
    """What ``python -m cropr`` does in the copy."""
    if argv[0] == "serve":
        serve()
    if argv[0] not in FORKED or is_first(argv[0]):
        return import_module("cropr.cli").main(argv)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(SOCKET))
        request = json.dumps({"argv": argv, "env": dict(os.environ)}).encode()
        socket.send_fds(connection, [request], [0, 1, 2])
        return int(connection.recv(16) or 1)


def is_first(verb: str) -> bool:
    """Whether no job of this verb has run before."""
    try:
        Path(f".started-{verb}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def serve() -> None:
    """Import what jobs need, and fork for each that asks; ends with a signal."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the jobs
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(SOCKET))
    listener.listen(16)
    tasks = [task.run.partition(":")[0] for task in import_module("cropr.tasks").TASKS.values()]
    for module in ("timm", "cropr.build", *tasks, *(f"cropr.cli.{verb}" for verb in FORKED)):
        import_module(module)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            run_job(connection)
        connection.close()


def run_job(connection: socket.socket) -> None:
    """One job, with the streams and the environment of the process that asks; it gets the status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    request, status = json.loads(message), 1
    os.environ.clear()
    os.environ.update(request["env"])
    try:
        status = import_module("cropr.cli").main(request["argv"])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(str(status).encode())
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
