"""Run a function on several ranks: one call in a test, a timeout, the stacks of all ranks, nothing left behind."""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def run_ranks(function: str, world_size: int, folder: Path, *, timeout_s: float) -> None:
    """Run ``module:function`` (importable from ``tests/``) on ``world_size`` ranks with ``folder`` as its argument.

    The function finds RANK, WORLD_SIZE and the rendezvous in the environment, as under torchrun, and leaves its results
    in ``folder``. Output goes to ``folder/rank_K.txt``.

    Raises:
        AssertionError: a rank failed or the timeout passed; with the output of all ranks, stacks included.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"rank_{rank}.txt" for rank in range(world_size)]
    processes = []
    for rank, output in enumerate(outputs):
        with output.open("w") as stream:
            command = [sys.executable, "-u", "-m", "support.ranks", function, str(folder)]
            ids = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment | ids, stdout=stream, stderr=subprocess.STDOUT))
    try:
        problem = _wait(processes, time.monotonic() + timeout_s)
        if problem:
            for process in processes:  # the rank that waits is as telling as the one that failed
                if process.poll() is None:
                    process.send_signal(signal.SIGUSR1)
            time.sleep(1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    if problem:
        report = "\n".join(f"--- rank {rank}\n{output.read_text()[-6000:]}" for rank, output in enumerate(outputs))
        raise AssertionError(f"{function}: {problem}\n{report}")


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> str | None:
    """None when all ranks ended well, else what went wrong first."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        failed = [(rank, code) for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            return f"rank {failed[0][0]} ended with code {failed[0][1]}"
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)
    return "timeout: ranks " + ", ".join(str(r) for r, p in enumerate(processes) if p.poll() is None) + " did not end"


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    module, _, name = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), name)(Path(sys.argv[2]))
