"""Command lines of the processes that a launcher starts."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_mtp.config import Config, config_hash


def rank_arguments(config: Config, config_file: Path, corpus: Path) -> list[str]:
    """Arguments of ``dist_mtp.train``. The hash lets every rank check that the file is the configuration that was checked.

    Args:
        config: what ``config_file`` holds.
        corpus: folder of the tokenised corpus.
    """
    return ["--config", str(config_file), "--corpus", str(corpus), "--config-hash", config_hash(config)]


def agent_command(config: Config, config_file: Path, corpus: Path) -> list[str]:
    """Starts one node's ranks; ``--nodes``, ``--node-rank`` and ``--rendezvous`` follow."""
    return [sys.executable, "-u", "-m", "dist_mtp.launch.agent", *rank_arguments(config, config_file, corpus)]


def shown(argv: Sequence[str]) -> str:
    """A command line as one types it."""
    return shlex.join(argv)
