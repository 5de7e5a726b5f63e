"""From command-line overrides to a checked configuration, through Hydra's groups in ``dist_mtp.conf``."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_mtp.config import Config, from_mapping
from dist_mtp.data.tokenizers import tokenizer_vocab_size
from dist_mtp.errors import ConfigError
from dist_mtp.pipeline.unit_times import read_unit_times
from dist_mtp.sweep.plugins import check_hydra_override
from dist_mtp.typed_config import nearest, valid_keys

_TARGET = re.compile(r"(?<!\w)_target_['\"]?\s*[:=]")
_LAYOUT = re.compile(r"pipeline\.layout=(\d+(,\d+)*|[\s(]*E[^'\"\\$]*)")
"""Numbers of units, or a layout string such as ``Et*3|(tt|)*29,m|L``: neither is a value of Hydra's grammar unless quoted."""
_OPEN_SECTIONS = ("ds.", "launcher.environment.")
"""Whose keys are not in the schema."""
_OVERRIDE = re.compile(r"^(?P<sign>~|\+\+?)?(?P<key>[^=@]+)(@[^=]*)?(=.*)?$", re.DOTALL)


def register_schema() -> None:
    """Make the dataclasses' defaults the base that ``conf/config.yaml`` starts from."""
    ConfigStore.instance().store(name="schema", node=json.loads(json.dumps(dataclasses.asdict(Config()))))


def compose(overrides: Sequence[str]) -> Config:
    """Compose and check.

    Raises:
        ConfigError: names the key, and the nearest valid one.
    """
    register_schema()
    try:
        with initialize_config_module("dist_mtp.conf", version_base="1.3"):
            composed = hydra_compose("config", overrides=check_overrides(overrides))
        return from_composed(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def explain(error: Exception) -> str:
    """Hydra's message on one line, with the argument it is about, and what to do where that is ours to say."""
    text = " ".join(line.strip() for line in str(error).splitlines()).strip()
    if isinstance(error, OverrideParseException):
        return f"'{error.override}' cannot be parsed: {text}"
    if "BasicSweeper does not support sweep type" in text:
        text += ": a grid needs values (a,b or range(1,5)); hydra/sweeper=optuna takes intervals"
    return text


def from_composed(composed: DictConfig) -> Config:
    """Turn Hydra's result into :class:`Config`."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    values.pop("hydra", None)
    refuse_targets(values)
    return _with_unit_times(from_mapping(values))


def _with_unit_times(config: Config) -> Config:
    """The configuration with what ``pipeline.unit_times_file`` says, for ranks that may not see that file.

    Raises:
        ConfigError: it cannot be read, or was measured with other settings.
    """
    file = config.pipeline.unit_times_file
    if file is None:
        return config
    if config.pipeline.unit_times:
        raise ConfigError(f"pipeline.unit_times and pipeline.unit_times_file={file} are both given: remove one of them")
    vocab_size = config.model.vocab_size or tokenizer_vocab_size(config.tokenizer)
    try:
        times = read_unit_times(Path(file))
        times.check_fits(dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size)))
    except ConfigError as error:
        raise ConfigError(f"pipeline.unit_times_file={file}: {error}") from error
    seconds: dict[str, tuple[float, float, float]] = {**times.seconds}
    return dataclasses.replace(config, pipeline=dataclasses.replace(config.pipeline, unit_times=seconds))


def check_overrides(overrides: Sequence[str]) -> list[str]:
    """Refuse unknown keys with the nearest valid one; let sections whose keys are open be added to without a ``+``.

    Raises:
        ConfigError: an argument that is no ``KEY=VALUE``, an unknown key, an unknown group member or code to run.
    """
    keys, groups = valid_keys(Config), config_groups()
    own_files = any(override.startswith("hydra.searchpath=") for override in overrides)
    checked = []
    for override in overrides:
        match = _OVERRIDE.match(override)
        if match is None or ("=" not in override and match["sign"] != "~"):
            raise ConfigError(f"'{override}' is not an override: write KEY=VALUE{nearest(override, list(keys))}")
        if _TARGET.search(override):
            raise ConfigError(f"'{override}' is refused: configurations name things, they do not run code (_target_)")
        key, value = match["key"].replace("/", "."), override.partition("=")[2]
        if match["sign"] == "~":
            raise ConfigError(f"'{override}' would delete {key}, but no key can be absent: set {key} to another value")
        if key.startswith(_OPEN_SECTIONS) or (key in keys and key not in groups and value.startswith("{")):
            # Added by force, so that keys unknown to Hydra reach from_mapping, which names the nearest known one.
            checked.append(override if match["sign"] else f"++{override}")
            continue
        if layout := _LAYOUT.fullmatch(override):
            override = f"pipeline.layout='{layout[1]}'"  # bare, Hydra takes commas for a sweep
        if key in groups:
            several = "," in value or "(" in value or value.startswith("[")  # a sweep, such as glob(*)
            known = value in ("", "null", *groups[key]) or own_files or several
            if not known:
                raise ConfigError(f"{key}={value} is not one of {', '.join(groups[key])}{nearest(value, groups[key])}")
        elif key.startswith("hydra."):
            check_hydra_override(key, value)
        elif key not in keys:
            raise ConfigError(f"unknown key '{key}'{nearest(key, [*keys, *groups])}")
        elif key in keys and dataclasses.is_dataclass(keys[key]) and value and not value.startswith("{"):
            raise ConfigError(f"{key}={value}: {key} is a section, set one of its keys such as {_first_key(key)}")
        checked.append(override)
    return checked


def config_groups() -> dict[str, list[str]]:
    """Hydra groups of ``conf/`` and their members."""
    folder = files("dist_mtp.conf")
    return {
        group.name: sorted(
            member.name.removesuffix(".yaml") for member in group.iterdir() if member.name.endswith(".yaml")
        )
        for group in folder.iterdir()
        if group.is_dir() and not group.name.startswith("__")
    }


def refuse_targets(values: Any, path: str = "") -> None:
    """``_target_`` would name code to run; nothing here instantiates it, and its presence means a mistake or an attack."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key == "_target_":
                raise ConfigError(f"{path}_target_ is refused: configurations name things, they do not run code")
            refuse_targets(value, f"{path}{key}.")
    elif isinstance(values, list):
        for index, value in enumerate(values):
            refuse_targets(value, f"{path}{index}.")


def _first_key(section: str) -> str:
    return next(key for key in valid_keys(Config) if key.startswith(section + "."))
