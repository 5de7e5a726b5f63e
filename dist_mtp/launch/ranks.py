"""The ranks of one node: started by ``torchrun``, called as a library so that failures come back as data."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from dist_mtp.config import Config
from dist_mtp.errors import EXIT_DONE
from dist_mtp.launch.outcome import Outcome, explain_failure, explain_stop, training_began

RANK_MODULE = "dist_mtp.train"
DUMP_S = 1.0
"""What a rank gets to write its stacks before it is killed."""


@dataclass(frozen=True)
class Place:
    """This node among those of the run."""

    nodes: int = 1
    node_rank: int = 0
    ranks: int = 1
    """That this node starts."""
    master: tuple[str, int] = ("127.0.0.1", 0)
    """Address and port on the first node where ranks of several nodes meet."""

    @property
    def first_rank(self) -> int:
        return self.node_rank * self.ranks


def run_ranks(config: Config, arguments: Sequence[str], place: Place) -> Outcome:
    """Start this node's ranks and wait for their end.

    Args:
        arguments: of every rank, see :func:`dist_mtp.launch.command.rank_arguments`.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its report of a failed rank names processes, not what happened; ours follows. Each module's logger has a level.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    single = place.nodes == 1
    settings = LaunchConfig(
        min_nodes=place.nodes,
        max_nodes=place.nodes,
        nproc_per_node=place.ranks,
        run_id=config.run_name,
        rdzv_backend="c10d" if single else "static",
        # torch does not recognise a machine by its own address if its name means 127.0.1.1, as on Debian: nobody would listen.
        rdzv_endpoint="127.0.0.1:0" if single else f"{place.master[0]}:{place.master[1]}",
        rdzv_configs={} if single else {"rank": place.node_rank, "timeout": int(config.launcher.join_timeout_s) + 60},
        local_addr="127.0.0.1" if single else None,
        max_restarts=0,
        monitor_interval=0.1,
    )
    if hasattr(settings, "shutdown_timeout"):  # torch 2.11 always waits 30 s
        # After a signal, ranks finish their step and save: as long as that makes progress, they are not killed.
        settings.shutdown_timeout = max(30, int(config.train.hang_timeout_s))
    before = training_began(config)
    try:
        elastic_launch(settings, sys.executable)("-u", "-m", RANK_MODULE, *arguments)
    except ChildFailedError as error:
        return explain_failure(config, error.failures)
    except SignalException as stopped:
        return explain_stop(config, signal.Signals(stopped.sigval), trained=training_began(config) != before)
    finally:
        _kill_left()
    return Outcome(EXIT_DONE, "")


def kill_ranks() -> None:
    """End this process's ranks, which wait for peers that will never answer; their logs get their stacks first."""
    ranks = _ranks()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(signal.SIGUSR1)
    time.sleep(DUMP_S if ranks else 0)
    for rank in _ranks():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()


def _kill_left() -> None:
    """A signal that comes while torch's ``PContext.start`` is at work leaves it without a word of the ranks that it has
    started already (torch 2.13, ``elastic/multiprocessing/api.py``). They are too young to have anything to save."""
    for rank in _ranks():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()


def _ranks() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if RANK_MODULE in child.cmdline():
                found.append(child)
    return found
