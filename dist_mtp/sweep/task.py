"""What Hydra's launchers call for each point, in this process or in another, here or on a node of a cluster."""

from __future__ import annotations

import dataclasses
import fcntl
import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dist_mtp.cli.compose import from_composed
from dist_mtp.config import Config, RunConfig, to_dict
from dist_mtp.errors import EXIT_CONFIG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_TERMINATED, ConfigError
from dist_mtp.monitor.result import read_result
from dist_mtp.monitor.sweep_points import RECORDS, PointRecord, write_record
from dist_mtp.run_folder import CONFIG_FILE, lock_run_folder
from dist_mtp.signals import end_with_parent
from dist_mtp.sweep.definition import point_arguments, point_name
from dist_mtp.sweep.folder import read_sweep, stopped_by, trained_differently

_RELEASE_S = 60.0
"""How long the run folder may still be held by a point whose sweep was killed: it saves a checkpoint first."""


def run_point(composed: DictConfig) -> float | None:
    """Train a point that is not finished yet.

    Everything it needs is in ``composed`` and in Hydra's own configuration, and what became of the point is written down, so
    that other processes can run it. It never raises, because that would end the whole sweep.

    Returns:
        The objective, None if the point has none: Optuna counts that as a failed trial.
    """
    job = HydraConfig.get()
    folder = Path(job.sweep.dir).parent
    sweep = read_sweep(folder)
    overrides = list(job.overrides.task)
    name = point_name(overrides, sweep["shared"])
    record = PointRecord(job.job.num, name, tuple(overrides), host=socket.gethostname())
    title = f"point {record.number + 1}/{sweep['num_points']} {name}"
    started = time.monotonic()
    with _one_at_a_time(folder / RECORDS / f"{name}.lock"):
        try:
            config = dataclasses.replace(from_composed(composed), run=RunConfig(dir=str(folder / name)))
            record = _ended(folder, record, config, title)
        except Exception as error:
            code = getattr(error, "exit_code", EXIT_CONFIG)
            record = dataclasses.replace(record, status="failed", exit_code=code, message=str(error))
    record = dataclasses.replace(record, seconds=round(time.monotonic() - started, 3), pid=None)
    write_record(folder, record)
    print(f"{title}: {_outcome(record)}", file=sys.stderr if record.exit_code else sys.stdout, flush=True)
    return record.objective


def _ended(folder: Path, record: PointRecord, config: Config, title: str) -> PointRecord:
    """Run the point, unless it is finished or the sweep is stopping."""
    run_dir = folder / record.name
    if stopped := stopped_by(folder):
        return _interrupted(record, stopped)
    if config.resume != "never" and (objective := finished(run_dir, config)) is not None:
        return dataclasses.replace(record, status="finished before", exit_code=EXIT_DONE, objective=objective)
    _wait_for_release(run_dir)
    print(title, flush=True)
    job = HydraConfig.get()
    search_path = [override for override in job.overrides.hydra if override.startswith("hydra.searchpath=")]
    arguments = point_arguments(search_path, record.overrides, run_dir)
    if job.runtime.choices["hydra/launcher"] == "joblib":
        end_with_parent()  # its workers outlive a killed sweep otherwise
    is_alone = job.runtime.choices["hydra/launcher"] == "basic"
    # Points side by side would write into each other's lines.
    log = None if is_alone else folder / RECORDS / f"{record.name}.log"
    code = run_process([sys.executable, "-m", "dist_mtp.cli.main", "train", *arguments], folder, record, log)
    if code != EXIT_DONE and stopped_by(folder) and code < 0:
        return _interrupted(record, stopped_by(folder) or 0)
    result = read_result(run_dir) or {}
    status = result.get("status", "started" if code == EXIT_DONE else "failed")
    message = result.get("message") or (None if code == EXIT_DONE else f"exit code {code}, see the messages above")
    record = dataclasses.replace(record, status=status, exit_code=code, message=message)
    if status != "done":
        return record
    if wrong := trained_differently(_config_of(run_dir), to_dict(config)):
        raise ConfigError(f"{run_dir} was trained with other settings than its point has: {_spelled(wrong)}")
    return dataclasses.replace(record, objective=_usable(result))


def finished(run_dir: Path, config: Config) -> float | None:
    """The objective of a run that ended well with what ``config`` would learn; None if it has to be run, or run on.

    Raises:
        ConfigError: the run was trained with other settings, of which ``train.steps`` alone may grow.
    """
    if not (run_dir / CONFIG_FILE).exists():
        return None
    different = trained_differently(_config_of(run_dir), to_dict(config))
    before, after = different.get("train.steps", (0, 0))
    is_longer = after > before
    if is_longer:
        del different["train.steps"]
    if different:
        raise ConfigError(
            f"{run_dir} was trained with other settings ({_spelled(different)}): choose run.name=..., or resume=never to set it "
            "aside and start anew"
        )
    result = read_result(run_dir)
    return _usable(result) if not is_longer and result is not None and result["status"] == "done" else None


def run_process(command: list[str], folder: Path, record: PointRecord, log: Path | None) -> int:
    """Exit code of the command, whose process is noted, so that the sweep can stop it.

    Args:
        log: file for its output; None leaves it on the console.
    """
    output = None if log is None else open(log, "ab")  # noqa: SIM115 (closed below)
    try:
        # A sweep that is killed must not leave a point behind that trains on, and holds its folder, unseen.
        with subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=end_with_parent) as process:
            write_record(folder, dataclasses.replace(record, pid=process.pid))
            if stopped_by(folder):  # the signal came before there was a process to pass it on to
                process.terminate()
            with _interrupts_ignored():
                return process.wait()
    finally:
        if output is not None:
            output.close()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """In a worker of its own: Ctrl-C reaches it as well, and it must see how its point ends."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Optuna may propose a point twice in a batch: the second waits, and then finds it finished."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _wait_for_release(run_dir: Path) -> None:
    deadline = time.monotonic() + _RELEASE_S
    while run_dir.exists():
        try:
            lock_run_folder(run_dir).close()
            return
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _interrupted(record: PointRecord, number: int) -> PointRecord:
    code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED
    return dataclasses.replace(record, status="interrupted", exit_code=code, message="the sweep was stopped")


def _config_of(run_dir: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{run_dir / CONFIG_FILE} cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}


def _usable(result: dict[str, Any]) -> float | None:
    """A number that a sweeper can compare."""
    objective = result["objective"]
    return objective if isinstance(objective, int | float) and math.isfinite(objective) else None


def _spelled(different: dict[str, Any]) -> str:
    return ", ".join(f"{key} {old} -> {new}" for key, (old, new) in different.items())


def _outcome(record: PointRecord) -> str:
    if record.exit_code:
        return f"{record.status} (exit code {record.exit_code}): {record.message}"
    return record.status + ("" if record.objective is None else f", objective {record.objective:.4f}")
