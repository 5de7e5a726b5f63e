"""One run of four ranks on hosts of :mod:`support.hosts`: every way to start it, and what came of it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.hosts import Host, Hosts, kill_all, watch_empty
from support.launches import BIN, overrides

from dist_mtp.monitor.metrics import comparable, read_metrics

LAYOUT = ("parallel.pp=2", "parallel.dp=2", "parallel.ep=2")
"""The pipeline crosses hosts; replicas, and ranks that share experts, are neighbours on one."""
STEPS = 8
TIMEOUT_S = 120.0
"""Of one run. It takes about 12 s on two idle cores."""
RENDEZVOUS = "node0:29500"


def settings(folder: Path, run: str, *more: str) -> list[str]:
    """Overrides of the run in ``folder/run``."""
    return overrides(folder, run, *LAYOUT, f"train.steps={STEPS}", "checkpoint.every=2", *more)


@dataclass(frozen=True)
class Ended:
    """How a command on a host ended."""

    code: int
    output: str
    """Standard output and error in the order they came."""
    ended_at: float
    """``time.monotonic()``."""


class Commands:
    """Commands that train together, started on hosts at the same time; a context manager that leaves nothing running.

    Args:
        folder: working folder; ``NAME-HOST.out`` there takes a command's output.
    """

    def __init__(self, cluster: Hosts, commands: Mapping[Host, Sequence[str]], folder: Path, name: str) -> None:
        self.started_at = time.monotonic()
        self._hosts = cluster.hosts
        self._others = {pid for host in cluster.hosts for pid in host.processes()}
        self._processes: dict[Host, subprocess.Popen[bytes]] = {}
        self._outputs = {host: folder / f"{name}-{host.name}.out" for host in commands}
        for host, argv in commands.items():
            with self._outputs[host].open("w") as output:
                self._processes[host] = subprocess.Popen(
                    host.command(argv),
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *error: object) -> None:
        kill_all(self._hosts, self._others)
        for process in self._processes.values():
            process.wait(10)

    def left_behind(self, timeout_s: float, host: Host | None = None) -> dict[str, list[str]]:
        """What of the run is alive after ``timeout_s`` seconds, on all hosts or on one."""
        return watch_empty(self._hosts if host is None else [host], timeout_s, self._others)

    @property
    def output(self) -> str:
        return "\n".join(
            f"--- {host.name}:\n{file.read_text(errors='replace')}" for host, file in self._outputs.items()
        )

    def wait_for_step(self, run: Path, step: int) -> None:
        """Return once ``metrics.jsonl`` of the run has the row of ``step``."""
        file, deadline = run / "metrics.jsonl", time.monotonic() + TIMEOUT_S
        while not file.exists() or file.read_bytes().count(b"\n") < step:
            if time.monotonic() > deadline or any(p.poll() is not None for p in self._processes.values()):
                raise AssertionError(f"{run} never came to step {step}:\n{self.output}")
            time.sleep(0.005)

    def end(self, timeout_s: float = TIMEOUT_S) -> dict[Host, Ended]:
        """Wait until all have ended."""
        deadline, ended = time.monotonic() + timeout_s, {}
        while len(ended) < len(self._processes):
            for host, process in self._processes.items():
                if host not in ended and process.poll() is not None:
                    output = self._outputs[host].read_text(errors="replace")
                    ended[host] = Ended(process.returncode, output, time.monotonic())
            if time.monotonic() > deadline:
                raise AssertionError(f"not ended after {timeout_s:g} s:\n{self.output}")
            time.sleep(0.02)
        return ended


def by_hand(cluster: Hosts, overrides: Sequence[str]) -> dict[Host, list[str]]:
    """PyTorch's own launcher on every host."""
    start = [str(BIN / "torchrun"), f"--nnodes={len(cluster.hosts)}", "--nproc-per-node=2"]
    start += ["--rdzv-backend=c10d", f"--rdzv-endpoint={RENDEZVOUS}", "--rdzv-id=by-hand"]
    return {host: [*start, "-m", "dist_mtp.train", *overrides] for host in cluster.hosts}


def by_ssh(cluster: Hosts, overrides: Sequence[str]) -> dict[Host, list[str]]:
    """``dist-mtp train`` on the first host, which starts all."""
    return {cluster.hosts[0]: [*_dist_mtp(overrides), "launcher=torchrun", *named(cluster)]}


def on_each(cluster: Hosts, overrides: Sequence[str]) -> dict[Host, list[str]]:
    """The same ``dist-mtp train`` on every host; the last host's comes first."""
    where = [f"launcher.nodes={len(cluster.hosts)}", f"launcher.rendezvous={RENDEZVOUS}", "launcher.ranks_per_node=2"]
    return {host: [*_dist_mtp(overrides), "launcher=torchrun", *where] for host in reversed(cluster.hosts)}


def by_deepspeed(cluster: Hosts, overrides: Sequence[str]) -> dict[Host, list[str]]:
    """DeepSpeed's launcher over pdsh and ssh."""
    return {cluster.hosts[0]: [*_dist_mtp(overrides), "launcher=deepspeed", *named(cluster)]}


def by_mpirun(cluster: Hosts, overrides: Sequence[str]) -> dict[Host, list[str]]:
    """DeepSpeed's launcher over OpenMPI and ssh."""
    return {
        host: [*command, "launcher.remote_shell=openmpi"] for host, command in by_deepspeed(cluster, overrides).items()
    }


def named(cluster: Hosts) -> list[str]:
    """Overrides that name all hosts."""
    names = ",".join(host.name for host in cluster.hosts)
    return [f"launcher.hosts=[{names}]", f"launcher.ssh_config={cluster.ssh_config}", "launcher.ranks_per_node=2"]


def _dist_mtp(overrides: Sequence[str]) -> list[str]:
    return [str(BIN / "dist-mtp"), "train", *overrides]


def rows(run: Path) -> list[dict[str, float]]:
    """What equal runs must agree on exactly, step by step."""
    return [comparable(row) for row in read_metrics(run / "metrics.jsonl")]
