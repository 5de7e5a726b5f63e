"""Real runs in processes of their own: start, watch, signal and clean up."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_mtp.monitor.metrics import read_metrics

BIN = Path(sys.executable).parent
TINY = (
    "data=text",
    "data.validation_fraction=0.2",
    "model.num_layers=2",
    "train.seq_len=32",
    "train.micro_batch_size=1",
    "train.micro_batches=8",
    "eval.batches=1",
    "monitor.tensorboard=false",
)
"""Settings of a model whose step takes a tenth of a second on two cores; ``data.path`` is added by :func:`overrides`."""
TIMEOUT_S = 150.0
"""Of one run. It takes about 10 s on an idle machine."""


def overrides(folder: Path, run: str, *more: str) -> list[str]:
    """Command line of the run in ``folder/run`` on a small corpus of its own."""
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir(parents=True)
        for index in range(10):
            words = [f"{(index * 31 + i * i) % 97} owls watch {(i * 7) % 13} oaks," for i in range(60)]
            (texts / f"{index}.txt").write_text(" ".join(words))
    return [*TINY, f"data.path={texts}", f"data.cache_dir={folder / 'cache'}", f"run.dir={folder / run}", *more]


def dist_mtp(*arguments: str) -> list[str]:
    return [str(BIN / "dist-mtp"), "train", *arguments]


def torchrun(*arguments: str) -> list[str]:
    return [str(BIN / "torchrun"), "--nproc-per-node", "2", "-m", "dist_mtp.train", *arguments]


def deepspeed(*arguments: str) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(port)]
    return [*command, "--module", "dist_mtp.train", *arguments]


@dataclass(frozen=True)
class Ended:
    """How a run ended; ``output`` is standard output and error in the order they came."""

    folder: Path
    code: int
    output: str
    seconds: float

    @property
    def rows(self) -> list[dict[str, float]]:
        return read_metrics(self.folder / "metrics.jsonl")

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank_{rank}.log").read_text()


class Running:
    """A command that trains in ``folder``, in a session of its own."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self._output = folder.with_name(folder.name + ".out")
        self._started = time.monotonic()
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=folder.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def wait_for_step(self, step: int) -> None:
        """Return once ``metrics.jsonl`` has the row of ``step``."""
        file = self.folder / "metrics.jsonl"
        self.wait_until(lambda: file.exists() and file.read_bytes().count(b"\n") >= step, f"step {step}")

    def wait_until(self, reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.clean_up()
                raise AssertionError(f"{self.folder} never came to {what}:\n{self.output}")
            time.sleep(0.005)

    def rank_pids(self) -> dict[int, int]:
        """Process of each rank."""
        pids = {}
        for pid in processes_of(self.folder):
            with contextlib.suppress(OSError):
                for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if entry.startswith(b"RANK="):
                        pids[int(entry.removeprefix(b"RANK="))] = pid
        return pids

    def end(self, timeout_s: float = TIMEOUT_S) -> Ended:
        """Wait for the end; nothing of the run is alive afterwards."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.clean_up()
            raise AssertionError(f"{self.folder} had not ended after {timeout_s} s:\n{self.output}") from None
        seconds = time.monotonic() - self._started
        left = processes_of(self.folder)
        self.clean_up()
        assert left == [], f"processes {left} of {self.folder} outlived their launcher:\n{self.output}"
        return Ended(self.folder, code, self.output, seconds)

    def clean_up(self) -> None:
        """Kill what is left of the run."""
        for pid in {self.process.pid, *processes_of(self.folder)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)


def train(command: Sequence[str], folder: Path) -> Ended:
    """Run a command that trains in ``folder`` to its end."""
    return Running(command, folder).end()


def processes_of(folder: Path) -> list[int]:
    """Live processes whose command line names a file in ``folder``: launcher and ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if any(word in (f"run.dir={folder}".encode(), f"{folder}/config.yaml".encode()) for word in words):
                found.append(int(entry.name))
    return sorted(found)
