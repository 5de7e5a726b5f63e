"""Which of Hydra's sweepers and launchers a sweep may use, and what they may be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from dist_mtp.errors import ConfigError
from dist_mtp.typed_config import nearest

PLUGINS: dict[str, dict[str, tuple[str, str] | None]] = {
    "hydra/sweeper": {"basic": None, "optuna": ("optuna", "hydra_plugins.hydra_optuna_sweeper")},
    "hydra/launcher": {
        "basic": None,
        "joblib": ("joblib", "hydra_plugins.hydra_joblib_launcher"),
        "submitit_local": ("submitit", "hydra_plugins.hydra_submitit_launcher"),
        "submitit_slurm": ("submitit", "hydra_plugins.hydra_submitit_launcher"),
    },
}
"""Group -> choice -> extra of dist-mtp that installs it and the package to look for; None comes with Hydra."""
_SETTABLE = ("hydra.sweeper", "hydra.launcher", "hydra.searchpath")
_FOREIGN_CODE = {
    "hydra.sweeper.custom_search_space": "names a function to import: write the search space as overrides",
    "hydra.launcher.setup": "holds shell commands: put them into a file, and run that before dist-mtp",
}
_TARGETS = ("hydra._internal.core_plugins.", "hydra_plugins.hydra_", "optuna.samplers.")
"""Beginnings of the classes that the permitted choices name."""
_PLAIN_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
SEED = 1234


def check_hydra_override(key: str, value: str) -> None:
    """Refuse what is not about the choice of points, or could run code.

    Args:
        key: dotted, such as ``hydra.sweeper`` for ``hydra/sweeper=optuna``.

    Raises:
        ConfigError: another key of Hydra's, a plugin that is not permitted, or one that is not installed.
    """
    if key != "hydra.searchpath" and not (key + ".").startswith(("hydra.sweeper.", "hydra.launcher.")):
        raise ConfigError(
            f"{key} cannot be set: of Hydra's own keys only hydra/sweeper, hydra/launcher, their settings and "
            f"hydra.searchpath can{nearest(key, _SETTABLE)}"
        )
    for refused, reason in _FOREIGN_CODE.items():
        if key == refused and value not in ("", "null"):
            raise ConfigError(f"{key} is refused: it {reason}")
    group = key.replace(".", "/")
    if group not in PLUGINS:
        return
    choices = PLUGINS[group]
    if value not in choices:
        raise ConfigError(f"{group}={value} is not one of {', '.join(choices)}{nearest(value, list(choices))}")
    needed = choices[value]
    if needed is not None and not _is_installed(needed[1]):
        raise ConfigError(f"{group}={value} needs a package that is not installed: pip install 'dist-mtp[{needed[0]}]'")


def check_composed(hydra: Mapping[str, Any]) -> None:
    """Hydra instantiates classes and logging factories that its own section names; files of users can write there, too.

    Args:
        hydra: the ``hydra`` section of a composed configuration, as plain containers.

    Raises:
        ConfigError: it holds something that this project and the permitted plugins did not put there.
    """
    if hydra.get("callbacks"):
        raise ConfigError("hydra.callbacks is refused: configurations name things, they do not run code")
    for key in ("job_logging", "hydra_logging"):
        if hydra.get(key) != _PLAIN_LOGGING:
            raise ConfigError(f"hydra.{key} is refused: a logging configuration can name code to run")
    for group in PLUGINS:
        choice = hydra["runtime"]["choices"].get(group)
        if choice not in PLUGINS[group]:
            raise ConfigError(f"{group}={choice} is not one of {', '.join(PLUGINS[group])}")
    for key in _FOREIGN_CODE:
        if hydra[key.split(".")[1]].get(key.split(".")[2]):
            check_hydra_override(key, "set")
    for section in ("sweeper", "launcher"):
        _check_targets(hydra[section], f"hydra.{section}")


def plugin_defaults(hydra: Mapping[str, Any], given: Sequence[str], side_by_side: int) -> list[str]:
    """Overrides for settings whose defaults in Hydra's plugins would spoil a sweep; what the user gave stays.

    Args:
        hydra: the ``hydra`` section of the composed configuration.
        given: the command line's overrides.
        side_by_side: points that this machine can run at a time.
    """
    choices = hydra["runtime"]["choices"]
    defaults: dict[str, int] = {}
    if choices["hydra/sweeper"] == "optuna":
        # A trial that diverges is a result. The plugin's default of 0 would end the sweep with it.
        defaults["hydra.sweeper.max_failure_rate"] = 1
        if "seed" in hydra["sweeper"]["sampler"]:
            # The same sweep, started again, must propose the same trials, or none of them would be found finished.
            defaults["hydra.sweeper.sampler.seed"] = SEED
        if choices["hydra/launcher"] == "basic":
            defaults["hydra.sweeper.n_jobs"] = 1  # trials of one batch are proposed without each other's objectives
    if choices["hydra/launcher"] == "joblib":
        defaults["hydra.launcher.n_jobs"] = side_by_side
    keys = {override.partition("=")[0].lstrip("+") for override in given}
    return [f"{key}={value}" for key, value in defaults.items() if key not in keys]


def _check_targets(values: Any, path: str) -> None:
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key == "_target_" and not str(value).startswith(_TARGETS):
                raise ConfigError(
                    f"{path}._target_={value} is refused: configurations name things, they do not run code"
                )
            _check_targets(value, f"{path}.{key}")
    elif isinstance(values, list):
        for index, value in enumerate(values):
            _check_targets(value, f"{path}.{index}")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # no plugin at all
        return False
