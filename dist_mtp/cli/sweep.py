"""``dist-mtp train -m``: Hydra chooses the points of a sweep, each of which is one ``dist-mtp train`` of its own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dist_mtp.cli.compose import explain, register_schema
from dist_mtp.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_RANK_FAILURE, EXIT_TERMINATED, ConfigError
from dist_mtp.monitor.sweep_points import PointRecord, read_records
from dist_mtp.monitor.sweep_report import write_summary
from dist_mtp.sweep.array import is_array, submit
from dist_mtp.sweep.definition import Sweep, define
from dist_mtp.sweep.folder import claimed, stop_on_signals, stopped_by
from dist_mtp.sweep.task import run_point


def sweep(overrides: Sequence[str]) -> int:
    """Run all points that are not finished, each in a folder of its own; returns the first failing exit code.

    A point that fails does not keep the others from running; a signal does.

    Raises:
        ConfigError: the sweep cannot work; nothing was started.
    """
    definition = define(overrides)
    _check_launchers(definition)
    if is_array(definition):
        with claimed(definition):
            return submit(definition, overrides)
    with claimed(definition), stop_on_signals(definition.folder):
        _run(definition)
        records = read_records(definition.folder)
        print(write_summary(definition.folder))
        return exit_code(records, stopped_by(definition.folder))


def exit_code(records: Sequence[PointRecord], stopped: int | None) -> int:
    """That of the first point, in their order, that did not end well; a signal that no point noticed counts as well.

    Args:
        stopped: the signal that ended the sweep.
    """
    for record in records:
        if record.exit_code != EXIT_DONE:
            return EXIT_RANK_FAILURE if record.exit_code is None else record.exit_code
    if stopped is not None:
        return EXIT_INTERRUPTED if stopped == 2 else EXIT_TERMINATED
    return EXIT_DONE


def _run(definition: Sweep) -> None:
    """Let Hydra's sweeper and launcher call :func:`run_point`; failures of points are in their records."""
    register_schema()
    quoted = str(definition.folder / ".hydra").replace("\\", "\\\\").replace("'", "\\'")
    arguments = [*definition.overrides, f"hydra.sweep.dir='{quoted}'"]
    try:
        with initialize_config_module("dist_mtp.conf", version_base="1.3"), warnings.catch_warnings():
            if definition.sweeper == "optuna":
                _quieten_optuna()
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None  # the context manager has made it
            hydra.multirun("config", run_point, arguments, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    except ValueError as error:
        # Optuna's plugin looks for the best trial at the end, also when there is none.
        if "No trials are completed" not in str(error):
            raise


def _quieten_optuna() -> None:
    """Its lines about each trial would stand between those of the points, and its 2.10 warns of its own libraries."""
    warnings.simplefilter("ignore")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _check_launchers(definition: Sweep) -> None:
    launcher = definition.settings["launcher"]
    if launcher["name"] != "slurm":
        return
    if definition.launcher != "basic":
        raise ConfigError(
            f"launcher=slurm and hydra/launcher={definition.launcher} would both submit jobs: use launcher=slurm alone, or "
            f"hydra/launcher={definition.launcher} with launcher=local"
        )
    if definition.sweeper == "optuna" and not launcher["slurm"]["wait"] and not launcher["dry_run"]:
        raise ConfigError(
            "hydra/sweeper=optuna needs the objective of each trial before it can choose the next: set "
            "launcher.slurm.wait=true, or use hydra/launcher=submitit_slurm with launcher=local"
        )
