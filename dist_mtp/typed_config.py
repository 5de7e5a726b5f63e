"""From plain dictionaries to frozen dataclasses, strictly, with errors that name the key and the nearest valid one."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from dist_mtp.errors import ConfigError

T = TypeVar("T")


def valid_keys(schema: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a dataclass tree mapped to its type; sections themselves included."""
    keys: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(schema).items():
        key = prefix + name
        keys[key] = hint
        if dataclasses.is_dataclass(hint):
            keys.update(valid_keys(typing.cast(type, hint), key + "."))
    return keys


def nearest(name: str, candidates: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` or an empty string."""
    leaf = name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6) or [
        c
        for c in candidates
        if c.rsplit(".", 1)[-1] in difflib.get_close_matches(leaf, [c.rsplit(".", 1)[-1]], cutoff=0.75)
    ]
    return f" (did you mean '{close[0]}'?)" if close else ""


def build(schema: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Build ``schema`` from ``values``.

    Raises:
        ConfigError: an unknown key or a value of the wrong type, with the full dotted key.
    """
    hints = typing.get_type_hints(schema)
    for key in values:
        if str(key) not in hints:
            raise ConfigError(f"unknown key '{prefix}{key}'{nearest(prefix + str(key), [prefix + h for h in hints])}")
    arguments = {name: _convert(values[name], hint, prefix + name) for name, hint in hints.items() if name in values}
    return schema(**arguments)


def _convert(value: Any, hint: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a section of keys, got {value!r}")
        return build(typing.cast(type, hint), value, key + ".")
    origin, args = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, args, key)
    if origin is Literal:
        # YAML reads a bare `off` or `no` as a boolean; no choice of ours is spelled that way.
        if value not in args:
            choices = ", ".join(str(a) for a in args)
            raise ConfigError(f"{key}={value} is not one of {choices}{nearest(str(value), [str(a) for a in args])}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{key} must be a list, got {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_convert(item, args[0], f"{key}[{i}]") for i, item in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"{key} must have {len(args)} entries, got {len(value)}: {value!r}")
        return tuple(_convert(item, arg, f"{key}[{i}]") for i, (item, arg) in enumerate(zip(value, args, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a section of keys, got {value!r}")
        if args[1] is not Any:
            return {str(k): _convert(v, args[1], f"{key}.{k}") for k, v in value.items()}
        return {str(k): _plain(v) for k, v in value.items()}
    return _convert_scalar(value, hint, key)


def _convert_union(value: Any, args: tuple[Any, ...], key: str) -> Any:
    if value is None and type(None) in args:
        return None
    error: ConfigError | None = None
    for arg in args:
        if arg is type(None):
            continue
        try:
            return _convert(value, arg, key)
        except ConfigError as caught:
            error = caught
    assert error is not None
    raise error


def _convert_scalar(value: Any, hint: Any, key: str) -> Any:
    if isinstance(value, str) and hint in (int, float):
        # YAML 1.1 reads `1e-3` (no dot) as a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{key}={value} must be a finite number")
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    raise ConfigError(f"{key} must be {kind}, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
