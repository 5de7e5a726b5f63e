"""``dist-mtp VERB [overrides]``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from dist_mtp import __version__
from dist_mtp.errors import EXIT_CONFIG, DistMtpError
from dist_mtp.typed_config import nearest

VERBS = {
    "train": "train a model: start the ranks on the composed configuration (-m sweeps)",
    "plan": "show stages, balance and predicted bubble of a configuration, without devices",
    "data": "tokenise the corpus and show what is in it",
    "bench": "measure parts of training on this device: bench precision",
    "plot": "draw runs or a sweep as PNG: plot RUN..., plot sweep FOLDER",
    "doctor": "check this machine, and the hosts of launcher.*, for what training needs",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"dist-mtp {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(f"error: unknown verb '{verb}'{nearest(verb, list(VERBS))}\n\n{_usage()}", file=sys.stderr)
        return EXIT_CONFIG
    run: Callable[[list[str]], int] = import_module(f"dist_mtp.cli.{verb}").main
    try:
        return run(rest)
    except DistMtpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<6} {text}" for verb, text in VERBS.items())
    return (
        f"dist-mtp VERB [KEY=VALUE ...]\n\n{verbs}\n\n"
        "Keys and their meaning: dist_mtp/config.py; groups to choose from: conf/. Example:\n"
        "  dist-mtp train model=tiny mtp.depth=2 parallel.pp=2 train.steps=100 run.name=two-depths"
    )


if __name__ == "__main__":
    sys.exit(main())
