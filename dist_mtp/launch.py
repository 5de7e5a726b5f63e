"""Start the ranks of a run on this machine and turn what becomes of them into an exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from dist_mtp.config import Config
from dist_mtp.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_RANK_FAILURE, EXIT_TERMINATED
from dist_mtp.run_folder import CONFIG_FILE


def launch(config: Config) -> int:
    """Run all ranks to their end.

    Returns:
        The documented exit code: that of the rank that failed first, or 5 when it died or hung.
    """
    file = str(Path(config.run_dir) / CONFIG_FILE)
    os.environ.setdefault("OMP_NUM_THREADS", str(config.launcher.threads_per_rank))
    if config.launcher.name == "none":
        from dist_mtp.train import main

        return main(["--config", file])
    return _torchrun(config, file)


def _torchrun(config: Config, file: str) -> int:
    """``torchrun`` on loopback, called as a library so that failures come back as data."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its report of a failed rank names processes, not what happened; ours follows.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
    try:
        elastic_launch(settings, sys.executable)("-u", "-m", "dist_mtp.train", "--config", file)
    except ChildFailedError as error:
        return _explain_failure(config, error)
    except SignalException as stopped:
        return EXIT_INTERRUPTED if stopped.sigval == signal.SIGINT else EXIT_TERMINATED
    return EXIT_DONE


def _explain_failure(config: Config, error: Any) -> int:
    """Name the rank that failed first and say where its log is."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    if code < 0:
        print(f"error: rank {rank} was killed by {signal.Signals(-code).name}", file=sys.stderr)
        code = EXIT_RANK_FAILURE
    elif code in (1, EXIT_RANK_FAILURE):
        print(f"error: rank {rank} failed or stopped making progress", file=sys.stderr)
        code = EXIT_RANK_FAILURE
    print(f"logs of all ranks: {Path(config.run_dir) / 'logs'}", file=sys.stderr)
    return code
