"""Errors a user can meet, each with its documented exit code."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_DIVERGED = 4
EXIT_RANK_FAILURE = 5
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class DistMtpError(Exception):
    """Base of every error that ends a command with a message instead of a traceback."""

    exit_code = 1


class ConfigError(DistMtpError):
    """The configuration cannot work; nothing was started."""

    exit_code = EXIT_CONFIG


class DataError(DistMtpError):
    """A corpus, tokenizer or packed data file is missing or damaged."""

    exit_code = EXIT_DATA


class CheckpointError(DistMtpError):
    """A checkpoint is missing, damaged or does not belong to this model."""

    exit_code = EXIT_DATA


class DivergedError(DistMtpError):
    """The loss or the gradient norm stopped being finite."""

    exit_code = EXIT_DIVERGED
