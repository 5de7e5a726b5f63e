"""The run folder at start: written once, by the launcher or by rank 0, and never silently reused."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any, TextIO

import yaml

from dist_mtp.config import Config, config_hash, from_mapping, to_dict
from dist_mtp.errors import ConfigError
from dist_mtp.monitor.result import RESULT
from dist_mtp.same_run import clashes

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"


def lock_run_folder(folder: Path) -> TextIO:
    """Claim ``folder`` for this process until the returned file is closed, or the process ends in whatever way.

    Raises:
        ConfigError: another process has it.
        OSError: the folder cannot be written.
    """
    lock = open(folder / LOCK_FILE, "a", encoding="utf-8")  # noqa: SIM115 (closing it is the caller's)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ConfigError(
            f"run folder {folder} is in use by another run, which holds {LOCK_FILE}: end that run, or choose another run.name"
        ) from error
    except OSError:
        pass  # a file system without locks: the run must not fail for that
    return lock


def prepare_run_folder(config: Config) -> None:
    """Create or continue ``run.dir`` and write the resolved ``config.yaml`` into it.

    ``resume=never`` sets an existing run aside by renaming its folder, so nothing is lost. A folder without
    ``config.yaml`` holds no run and is used as it is.

    Raises:
        ConfigError: the folder belongs to a run with other settings or to one that is going on, or cannot be written.
    """
    folder = Path(config.run_dir)
    file = folder / CONFIG_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_run_folder(folder):
            if file.exists() and config.resume == "never":
                numbered = (folder.with_name(f"{folder.name}.old-{number}") for number in range(1, 10_000))
                folder.rename(next(aside for aside in numbered if not aside.exists()))
                folder.mkdir()
            elif file.exists():
                _check_same_run(folder, _read(file), to_dict(config))
            # A result says how the run ended; this one is about to go on.
            (folder / RESULT).unlink(missing_ok=True)
            temporary = file.with_suffix(".tmp")
            temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
            temporary.replace(file)
    except OSError as error:
        raise ConfigError(
            f"run folder {folder} cannot be written ({error.strerror}: {error.filename}): choose another run.dir"
        ) from error


def read_config(file: Path, expected_hash: str | None = None) -> Config:
    """The configuration in ``file``.

    Args:
        expected_hash: :func:`~dist_mtp.config.config_hash` of what was written there.

    Raises:
        ConfigError: it cannot be read, is not valid, or is not what was written.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {file} holds no configuration: give the config.yaml of a run folder")
    config = from_mapping(values)
    if expected_hash is not None and config_hash(config) != expected_hash:
        raise ConfigError(
            f"{file} is not the configuration that was launched: it was changed, or another run wrote it; start again"
        )
    return config


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is damaged: delete it, if the folder is your run's, or choose another run.name")
    return values


def _check_same_run(folder: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    if different := clashes(before, after):
        raise ConfigError(
            f"{folder} holds a run with other settings ({different}): choose run.name=..., or resume=never to set the old "
            "run aside and start anew"
        )
