"""Slurm's commands: queue a job, wait for it, stop it with a checkpoint."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_mtp.errors import ConfigError
from dist_mtp.signals import handled

_POLL_S, _STOP_S = 0.2, 1.0
_NUMBERED = re.compile(r"[0-9_]+\.[0-9]+")
"""A step that ``srun`` has started; the job's own script is ``JOB.batch``."""


@dataclass(frozen=True)
class EndedJob:
    """A job, or an array of jobs, that was waited for."""

    number: str
    code: int
    """What its script ended with, the highest one of an array; 0 if it was cancelled in the queue."""
    stopped_by: signal.Signals | None
    """First signal that this process got meanwhile."""


def queue_job(script: Path) -> str:
    """Number of the job.

    Raises:
        ConfigError: Slurm is not there or refuses the job, in its own words.
    """
    process = _start([], script)
    number = _number(process, script)
    process.communicate()
    return number


def run_job(script: Path) -> EndedJob:
    """Queue a job and wait for its end. SIGTERM and SIGINT cancel it if it is still queued, and let it save otherwise.

    Raises:
        ConfigError: Slurm is not there or refuses the job, in its own words.
    """
    received: list[int] = []
    with handled(lambda number, frame: received.append(number)):
        process = _start(["--wait"], script)
        job = _number(process, script)
        print(f"queued as job {job}; waiting for its end", flush=True)
        told: set[str] = set()
        while process.poll() is None:
            if received:
                told |= _stop(job, told)
            time.sleep(_STOP_S if received else _POLL_S)
        process.communicate()
    return EndedJob(job, process.returncode, signal.Signals(received[0]) if received else None)


def _start(options: Sequence[str], script: Path) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            ["sbatch", "--parsable", *options, str(script)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt at the terminal must not end the waiting
        )
    except FileNotFoundError as error:
        raise ConfigError(
            "launcher=slurm needs sbatch, which is not installed on this machine: give the command on a login node of the "
            "cluster, or use launcher=torchrun"
        ) from error


def _number(process: subprocess.Popen[str], script: Path) -> str:
    """``NUMBER`` or ``NUMBER;CLUSTER`` is sbatch's first line, as soon as the job is queued."""
    assert process.stdout is not None
    number = process.stdout.readline().strip().partition(";")[0]
    if not number:
        _, said = process.communicate()
        said = " ".join(said.split()) or f"exit code {process.returncode}"
        raise ConfigError(f"sbatch refuses {script}: {said}; see launcher.slurm.*")
    return number


def _stop(job: str, told: Collection[str]) -> set[str]:
    """Nothing is lost of what has not begun; to what runs goes the signal that ends it with a checkpoint.

    Between the queue and its ``srun`` a job has no step that could be signalled, so this is repeated until the job has ended;
    ranks would take a second signal for impatience, so no step gets two.

    Args:
        told: steps that have got it.

    Returns:
        Those that got it now.
    """
    _ask("scancel", "--state=PENDING", job)
    steps = _ask("squeue", "--noheader", "--steps", "--format=%i", f"--jobs={job}").split()
    new = {step for step in steps if _NUMBERED.fullmatch(step)} - set(told)
    for step in sorted(new):
        _ask("scancel", "--signal=TERM", step)
    return new


def _ask(*command: str) -> str:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
