"""What became of a node's ranks, as an exit code and a sentence."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_mtp.config import Config
from dist_mtp.errors import (
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DIVERGED,
    EXIT_INTERRUPTED,
    EXIT_RANK_FAILURE,
    EXIT_TERMINATED,
)
from dist_mtp.monitor.plan_files import PLAN
from dist_mtp.monitor.result import read_result, write_result

STOPPED = (EXIT_INTERRUPTED, EXIT_TERMINATED)
SAID = (EXIT_CONFIG, EXIT_DATA, EXIT_DIVERGED, *STOPPED)
"""Exit codes of a rank that ended on purpose and said why."""
_WAITING = re.compile(r"no progress for \d+ s in: ([^.\n]+)\.")
_TAIL = 1 << 16
"""Bytes at the end of a rank's log in which its last words are looked for."""


@dataclass(frozen=True)
class Outcome:
    """How a node's ranks ended."""

    code: int
    """The documented exit code."""
    message: str
    """For people; empty when there is nothing to say, or a rank has said it."""
    blame: int = 0
    """Which of several nodes' ends is the cause of the others: the least. 0: a rank said why it ended or was refused, 1: it
    was killed from outside, 2: it failed and another node cannot be reached, 3: it failed, 4: it was stopped because of
    another."""
    agreed: bool = True
    """After a signal: all ranks of the run have agreed to stop. If not, those of other nodes wait for this node's."""


def training_began(config: Config) -> int | None:
    """A mark that changes when rank 0 is set up and begins to train: it then writes ``plan.json`` anew."""
    plan = Path(config.run_dir) / PLAN
    return plan.stat().st_mtime_ns if plan.exists() else None


def report(config: Config, outcome: Outcome) -> None:
    """Tell people how the run ended, and leave a ``result.json`` if no rank could."""
    if outcome.code not in (0, *STOPPED) or outcome.message:
        if outcome.message:
            is_error = outcome.code not in STOPPED
            print(f"{'error: ' if is_error else ''}{outcome.message}", file=sys.stderr)
        print(f"logs of all ranks: {Path(config.run_dir) / 'logs'}", file=sys.stderr)
    if outcome.code and read_result(config.run_dir) is None and Path(config.run_dir).is_dir():
        status = "interrupted" if outcome.code in STOPPED else "failed"
        write_result(config.run_dir, status, outcome.code, {}, None, outcome.message or None)


def explain_stop(config: Config, stopped_by: signal.Signals, *, trained: bool) -> Outcome:
    """The end after a signal. Rank 0 writes ``result.json`` after the checkpoint; without it none was committed.

    Args:
        trained: the ranks had begun to train, so that there was something to save.
    """
    code = EXIT_INTERRUPTED if stopped_by == signal.SIGINT else EXIT_TERMINATED
    result = read_result(config.run_dir)
    if result is not None:
        return Outcome(code if result["status"] == "interrupted" else int(result["exit_code"]), "")
    return _explain_no_result(code, trained=trained)


def _explain_no_result(code: int, *, trained: bool) -> Outcome:
    if trained:
        text = "the run was stopped by a signal, but a rank died or hung before a checkpoint was committed"
        return Outcome(EXIT_RANK_FAILURE, text, blame=3)
    return stopped_before_training(code)


def stopped_before_training(code: int) -> Outcome:
    text = "stopped by a signal before training began: there was nothing to save"
    return Outcome(code, text, agreed=False)


def explain_failure(config: Config, failures: Mapping[int, Any]) -> Outcome:
    """Which rank failed first, and what its log says.

    Args:
        failures: torchrun's ``ProcessFailure`` of each rank that failed.
    """
    rank, failure = first_failure(failures)
    code = failure.exitcode
    if code in STOPPED:  # the signal may have come to another node
        result = read_result(config.run_dir)
        return Outcome(int(result["exit_code"]), "") if result is not None else _explain_no_result(code, trained=True)
    if code < 0:
        message = f"rank {rank} was killed by {failure.signal_name()}"
    elif code in SAID:
        message = f"rank {rank} ended with exit code {code}"
    else:
        message = f"rank {rank} failed or stopped making progress{_waited_in(config, rank)}"
    blame = _blame(code)
    code = code if code in SAID else EXIT_RANK_FAILURE
    for other, late in failures.items():
        # torchrun waits half a minute between its SIGTERM and its SIGKILL.
        if late.exitcode == -signal.SIGKILL and late.timestamp > failure.timestamp + 1:
            message += f"; rank {other} did not react to SIGTERM and was killed: it may be the one that hung"
    said_by_rank_0 = code != EXIT_RANK_FAILURE and rank == 0
    return Outcome(code, "" if said_by_rank_0 else message, blame)


def first_failure(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """The rank to blame and its ``ProcessFailure``.

    When one rank ends, its peers fail in their next exchange with it, often within the second that torchrun's time
    stamps resolve; then the rank whose end says most comes first.
    """
    start = min(failure.timestamp for failure in failures.values())
    rank = min(
        (rank for rank, failure in failures.items() if failure.timestamp <= start + 1),
        key=lambda rank: (_blame(failures[rank].exitcode), rank),
    )
    return rank, failures[rank]


def _blame(exit_code: int) -> int:
    """See :attr:`Outcome.blame`."""
    if exit_code in SAID:
        return 0
    if exit_code < 0 and exit_code != -signal.SIGTERM:
        return 1
    return 3 if exit_code > 0 else 4


def _waited_in(config: Config, rank: int) -> str:
    """``, waiting in step 3, action 1F0`` if the rank's watchdog wrote so."""
    try:
        with (Path(config.run_dir) / "logs" / f"rank_{rank}.log").open("rb") as log:
            log.seek(0, 2)
            log.seek(max(0, log.tell() - _TAIL))
            found = _WAITING.findall(log.read().decode(errors="replace"))
    except OSError:
        return ""
    return f", waiting in {found[-1]}" if found else ""
