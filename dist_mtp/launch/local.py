"""Ranks on this machine."""

from __future__ import annotations

from pathlib import Path

from dist_mtp.config import Config
from dist_mtp.launch.command import rank_arguments
from dist_mtp.launch.outcome import report
from dist_mtp.launch.ranks import Place, run_ranks
from dist_mtp.run_folder import CONFIG_FILE


def launch(config: Config, corpus: Path) -> int:
    """Run all ranks to their end.

    Args:
        config: that of the prepared run folder.
        corpus: folder of the tokenised corpus.

    Returns:
        The documented exit code: that of the rank that failed first, or 5 when it died or hung. 130 and 143 mean that a
        signal stopped the run and nothing was lost: a checkpoint was committed, or training had not begun.
    """
    arguments = rank_arguments(config, Path(config.run_dir) / CONFIG_FILE, corpus)
    if config.launcher.name == "none":
        from dist_mtp.train import main

        return main(arguments)
    outcome = run_ranks(config, arguments, Place(ranks=config.world_size))
    report(config, outcome)
    return outcome.code
