"""The folder of a sweep: claimed by one command at a time, and never filled with points of different settings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dist_mtp.errors import ConfigError
from dist_mtp.monitor.atomic import replace_text
from dist_mtp.monitor.sweep_points import RECORDS, read_records
from dist_mtp.run_folder import lock_run_folder
from dist_mtp.same_run import changed_keys
from dist_mtp.signals import handled
from dist_mtp.sweep.definition import Sweep

SWEEP_FILE = "sweep.json"
STOP_FILE = "stop"
_NOT_TRAINED = (
    "launcher",
    "monitor",
    "profiler",
    "resume",
    "run",
    "checkpoint",
    "debug",
    "train.hang_timeout_s",
    "data.cache_dir",
)
"""Sections and keys that do not change what a point learns."""


@contextmanager
def claimed(sweep: Sweep) -> Iterator[None]:
    """Hold the folder, with ``sweep.json`` written and the notes of an earlier start cleared.

    Raises:
        ConfigError: it is another sweep's, of other settings, or in use, or cannot be written.
    """
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        with lock_run_folder(sweep.folder):
            if sweep.settings["resume"] != "never":
                _check_same_sweep(sweep)
            shutil.rmtree(sweep.folder / RECORDS, ignore_errors=True)
            (sweep.folder / RECORDS).mkdir()
            replace_text(sweep.folder / SWEEP_FILE, json.dumps(_to_json(sweep), indent=2) + "\n")
            yield
    except OSError as error:
        raise ConfigError(
            f"the sweep's folder {sweep.folder} cannot be written ({error.strerror}: {error.filename}): choose another run.dir"
        ) from error


def read_sweep(folder: Path) -> dict[str, Any]:
    """``sweep.json``; empty if no sweep wrote the folder."""
    try:
        return json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def trained_differently(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys that change what is learnt, with both values. What ``after`` leaves open (null) is no difference."""
    return {
        key: values
        for key, values in changed_keys(before, after).items()
        if values[1] is not None and not any(f"{key}.".startswith(f"{free}.") for free in _NOT_TRAINED)
    }


@contextmanager
def stop_on_signals(folder: Path) -> Iterator[None]:
    """On SIGTERM or SIGINT let the points under way save and end, and start no others."""

    def stop(number: int, frame: object) -> None:
        (folder / RECORDS / STOP_FILE).write_text(str(number))
        for record in read_records(folder):
            if record.pid is None or record.host != socket.gethostname():
                continue
            with suppress(ProcessLookupError):
                # A terminal sends SIGINT to all that it started; a second one would cut short how they save.
                if number != signal.SIGINT or os.getpgid(record.pid) != os.getpgrp():
                    os.kill(record.pid, signal.SIGTERM)

    with handled(stop):
        yield


def stopped_by(folder: Path) -> int | None:
    """The signal that has ended the sweep, if any."""
    try:
        return int((folder / RECORDS / STOP_FILE).read_text())
    except (OSError, ValueError):
        return None


def _check_same_sweep(sweep: Sweep) -> None:
    before = read_sweep(sweep.folder).get("settings")
    if before is None:
        return
    different = {
        key: values
        for key, values in trained_differently(before, sweep.settings).items()
        if not (key == "train.steps" and values[1] >= values[0])
    }
    if different:
        changes = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in different.items())
        raise ConfigError(
            f"{sweep.folder} holds a sweep of points with other settings ({changes}): choose run.name=..., or resume=never to "
            "set its points aside and start anew"
        )


def _to_json(sweep: Sweep) -> dict[str, Any]:
    return {
        "overrides": sweep.overrides,
        "sweeper": sweep.sweeper,
        "launcher": sweep.launcher,
        "num_points": sweep.num_points,
        "shared": sweep.shared,
        "swept": sweep.swept,
        "settings": sweep.settings,
    }
