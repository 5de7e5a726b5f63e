"""What a command line with ``-m`` asks for: which keys are swept, how, where to, and the points if they are known."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_mtp.cli.compose import check_overrides, compose, explain, refuse_targets, register_schema
from dist_mtp.config import Config, from_mapping
from dist_mtp.errors import ConfigError
from dist_mtp.sweep.plugins import check_composed, plugin_defaults

_LONGEST_NAME = 200


@dataclass(frozen=True)
class Sweep:
    """A sweep before any of its points runs."""

    overrides: tuple[str, ...]
    """The command line's, checked, and with this project's defaults for Hydra's plugins."""
    folder: Path
    """Of the points' run folders: ``run.dir``, else ``sweeps/<run.name>``."""
    settings: dict[str, Any]
    """All keys as composed without the swept ones, not resolved: alone they need not be valid."""
    shared: tuple[str, ...]
    """Keys that the command line gives all points."""
    swept: tuple[str, ...]
    sweeper: str
    launcher: str
    """Hydra's, for points; ``settings["launcher"]`` is the one of ranks."""
    num_points: int
    """Points of a grid, or trials."""

    @property
    def search_path(self) -> list[str]:
        """The override that points need as well to find files of the user's own."""
        return [override for override in self.overrides if override.startswith("hydra.searchpath=")]


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    number: int
    """From 0, in the order of Hydra's sweeper: the last key varies fastest."""
    overrides: tuple[str, ...]
    """What ``dist-mtp train`` gets, all keys of the command line."""
    folder: Path
    config: Config
    """Not resolved; its ``run.dir`` is ``folder``."""


def define(overrides: Sequence[str]) -> Sweep:
    """Read a command line without its ``-m``.

    Raises:
        ConfigError: an unknown key, a missing plugin, a kind of sweep that the sweeper does not know, or nothing to sweep
            into.
    """
    checked = check_overrides(overrides)
    with _hydra() as hydra:
        composed = hydra.compose_config("config", checked, run_mode=RunMode.MULTIRUN, from_shell=False)
        node: Any = OmegaConf.to_container(composed.hydra, resolve=False)
        keys = [str(key) for key in composed if key != "hydra"]
        settings: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed, keys), resolve=True)
        check_composed(node)
        refuse_targets(settings)
        parser = OverridesParser.create(config_loader=hydra.config_loader)
        params = [f"{key}={value}" for key, value in (node["sweeper"].get("params") or {}).items()]
        given = parser.parse_overrides([*params, *node["overrides"]["task"]])
        swept = {override.get_key_element().lstrip("+"): None for override in given if override.is_sweep_override()}
        choices = node["runtime"]["choices"]
        sweeper = choices["hydra/sweeper"]
        num_points = node["sweeper"]["n_trials"] if sweeper == "optuna" else len(_grid(given))
    for key in {"run.dir", "resume"} & set(swept):
        raise ConfigError(f"{key} cannot be swept: each point has a folder of its own inside the sweep's")
    shared = {override.get_key_element().lstrip("+"): None for override in given if not override.is_sweep_override()}
    return Sweep(
        overrides=(*checked, *plugin_defaults(node, checked, _side_by_side(settings))),
        folder=_folder(settings),
        settings=settings,
        shared=tuple(key for key in shared if key not in swept),
        swept=tuple(swept),
        sweeper=sweeper,
        launcher=choices["hydra/launcher"],
        num_points=num_points,
    )


def expand(overrides: Sequence[str]) -> list[Point]:
    """All points of a grid, composed and checked; nothing is run or written.

    Raises:
        ConfigError: a point that cannot work, or a sweep that is not a grid: an Optuna sweep has no list of points.
    """
    sweep = define(overrides)
    if sweep.sweeper != "basic":
        raise ConfigError(f"hydra/sweeper={sweep.sweeper} chooses points as it goes: only a grid can be listed before")
    with _hydra() as hydra:
        composed = hydra.compose_config("config", list(sweep.overrides), run_mode=RunMode.MULTIRUN, from_shell=False)
        parser = OverridesParser.create(config_loader=hydra.config_loader)
        params = [f"{key}={value}" for key, value in (composed.hydra.sweeper.params or {}).items()]
        grid = _grid(parser.parse_overrides([*params, *composed.hydra.overrides.task]))
    points = []
    for number, combination in enumerate(grid):
        folder = sweep.folder / point_name(combination, sweep.shared)
        arguments = point_arguments(sweep.search_path, combination, folder)
        points.append(Point(number, tuple(arguments), folder, compose(arguments)))
    return points


def point_arguments(search_path: Sequence[str], overrides: Sequence[str], folder: Path) -> list[str]:
    """What ``dist-mtp train`` gets for a point."""
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return [*search_path, *overrides, f"run.dir='{quoted}'"]


def point_name(overrides: Sequence[str], shared: Sequence[str]) -> str:
    """``mtp.depth=0,optim.lr=0.001``: what tells this point from the others, as a folder's name.

    The same point has the same name in every sweep; characters that do not belong into one are replaced and the name is
    made unique by a hash.

    Args:
        shared: keys that all points have from the command line.
    """
    telling = sorted(o.lstrip("+") for o in overrides if o.lstrip("+").partition("=")[0] not in shared)
    whole = ",".join(telling)
    name = re.sub(r"[^\w.,=+-]", "_", whole.replace("'", "").replace('"', ""))
    if len(name) > _LONGEST_NAME or name != whole.replace("'", "").replace('"', ""):
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return name.lstrip(".-") or "point"


@contextmanager
def _hydra() -> Iterator[Any]:
    """Hydra's own object, for what its ``compose`` does not offer: a configuration that is not yet one of the points.

    Raises:
        ConfigError: what Hydra refuses, in its words.
    """
    register_schema()
    try:
        with initialize_config_module("dist_mtp.conf", version_base="1.3"):
            yield GlobalHydra.instance().hydra
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def _grid(given: Sequence[Any]) -> list[list[str]]:
    (points,) = BasicSweeper.split_arguments(list(given), max_batch_size=None)
    return points


def _folder(settings: dict[str, Any]) -> Path:
    """From the keys that name it; the others may be right only in the points."""
    named = {"run": settings["run"], **{section: {"name": settings[section]["name"]} for section in ("model", "data")}}
    config = from_mapping(named)
    return Path(config.run.dir or f"sweeps/{config.run_name}")


def _side_by_side(settings: dict[str, Any]) -> int:
    """Points whose ranks and threads this machine has cores for."""
    sizes = (settings["parallel"]["pp"], settings["parallel"]["dp"], settings["launcher"]["threads_per_rank"])
    cores_of_point = math.prod(size for size in sizes if isinstance(size, int))
    return max(1, (os.cpu_count() or 1) // cores_of_point)
