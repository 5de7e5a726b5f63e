"""Start the ranks of a run on this machine and turn what becomes of them into an exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_mtp.config import Config
from dist_mtp.errors import (
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_RANK_FAILURE,
    EXIT_TERMINATED,
)
from dist_mtp.monitor.plan_files import PLAN
from dist_mtp.monitor.result import read_result, write_result
from dist_mtp.run_folder import CONFIG_FILE

_STOPPED = (EXIT_INTERRUPTED, EXIT_TERMINATED)
_SAID = (EXIT_CONFIG, EXIT_DATA, EXIT_DIVERGED, *_STOPPED)
"""Exit codes of a rank that ended on purpose and said why."""


def launch(config: Config, corpus: Path) -> int:
    """Run all ranks to their end.

    Args:
        corpus: folder of the tokenised corpus.

    Returns:
        The documented exit code: that of the rank that failed first, or 5 when it died or hung. 130 and 143 mean that a
        signal stopped the run and nothing was lost: a checkpoint was committed, or training had not begun.
    """
    arguments = ["--config", str(Path(config.run_dir) / CONFIG_FILE), "--corpus", str(corpus)]
    os.environ.setdefault("OMP_NUM_THREADS", str(config.launcher.threads_per_rank))
    if config.launcher.name == "none":
        from dist_mtp.train import main

        return main(arguments)
    return _torchrun(config, arguments)


def _torchrun(config: Config, arguments: list[str]) -> int:
    """``torchrun`` on loopback, called as a library so that failures come back as data."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its report of a failed rank names processes, not what happened; ours follows. Each module's logger has a level.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.world_size,
        run_id=config.run_name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    if hasattr(settings, "shutdown_timeout"):  # torch 2.11 always waits 30 s
        # After a signal, ranks finish their step and save: as long as that makes progress, they are not killed.
        settings.shutdown_timeout = max(30, int(config.train.hang_timeout_s))
    before = _training_began(config)
    try:
        elastic_launch(settings, sys.executable)("-u", "-m", "dist_mtp.train", *arguments)
    except ChildFailedError as error:
        return _explain_failure(config, error)
    except SignalException as stopped:
        code = EXIT_INTERRUPTED if stopped.sigval == signal.SIGINT else EXIT_TERMINATED
        return _explain_stop(config, code, trained=_training_began(config) != before)
    return EXIT_DONE


def _training_began(config: Config) -> int | None:
    """A mark that changes when rank 0 is set up and begins to train: it then writes ``plan.json`` anew."""
    plan = Path(config.run_dir) / PLAN
    return plan.stat().st_mtime_ns if plan.exists() else None


def _explain_stop(config: Config, code: int, *, trained: bool) -> int:
    """The exit code after a signal. Rank 0 writes ``result.json`` after the checkpoint; without it none was committed.

    Args:
        code: of the signal.
        trained: the ranks had begun to train, so that there was something to save.
    """
    result = read_result(config.run_dir)
    if result is not None:
        return code if result["status"] == "interrupted" else int(result["exit_code"])
    if trained:
        code, status = EXIT_RANK_FAILURE, "failed"
        message = "the run was stopped by a signal, but a rank died or hung before a checkpoint was committed"
    else:
        status, message = "interrupted", "stopped by a signal before training began: there was nothing to save"
    print(f"{'error: ' if trained else ''}{message}", file=sys.stderr)
    print(f"logs of all ranks: {Path(config.run_dir) / 'logs'}", file=sys.stderr)
    write_result(config.run_dir, status, code, {}, None, message)
    return code


def _explain_failure(config: Config, error: Any) -> int:
    """Say which rank failed first and where its log is; leave a ``result.json`` if no rank could."""
    rank, failure = first_failure(error.failures)
    code = failure.exitcode
    if code in _STOPPED:
        return _explain_stop(config, code, trained=True)
    if code < 0:
        message = f"rank {rank} was killed by {failure.signal_name()}"
    elif code in _SAID:
        message = f"rank {rank} ended with exit code {code}"
    else:
        message = f"rank {rank} failed or stopped making progress"
    code = code if code in _SAID else EXIT_RANK_FAILURE
    for other, late in error.failures.items():
        # torchrun waits half a minute between its SIGTERM and its SIGKILL.
        if late.exitcode == -signal.SIGKILL and late.timestamp > failure.timestamp + 1:
            message += f"; rank {other} did not react to SIGTERM and was killed: it may be the one that hung"
    if code == EXIT_RANK_FAILURE or rank != 0:  # otherwise rank 0 has said it
        print(f"error: {message}", file=sys.stderr)
    print(f"logs of all ranks: {Path(config.run_dir) / 'logs'}", file=sys.stderr)
    if read_result(config.run_dir) is None:
        write_result(config.run_dir, "failed", code, {}, None, message)
    return code


def first_failure(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """The rank to blame and its ``ProcessFailure``.

    When one rank ends, its peers fail in their next exchange with it, often within the second that torchrun's time
    stamps resolve; then the rank whose end says most comes first.
    """

    def blame(rank: int) -> tuple[int, int]:
        code = failures[rank].exitcode
        if code in _SAID:
            return 0, rank
        if code < 0 and code != -signal.SIGTERM:
            return 1, rank  # killed from outside
        return (2, rank) if code > 0 else (3, rank)  # lost its peer, or torchrun stopped it for that

    start = min(failure.timestamp for failure in failures.values())
    rank = min((rank for rank, failure in failures.items() if failure.timestamp <= start + 1), key=blame)
    return rank, failures[rank]
