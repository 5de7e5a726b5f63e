"""The summary of a sweep, or of any folder of runs: a table, ``summary.json`` and ``summary.png``.

It needs no more than each run's ``config.yaml``, ``result.json`` and ``metrics.jsonl``, so it can be made at any time, also
while points are running. What a sweep noted about points without a run folder is added.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_mtp.errors import ConfigError, DataError
from dist_mtp.monitor import strict_json
from dist_mtp.monitor.atomic import replace_text
from dist_mtp.monitor.formatting import duration
from dist_mtp.monitor.metrics import read_metrics
from dist_mtp.monitor.result import RESULT, read_result
from dist_mtp.monitor.sweep_points import PointRecord, read_records
from dist_mtp.run_folder import CONFIG_FILE, lock_run_folder
from dist_mtp.same_run import changed_keys

SUMMARY = "summary.json"
PICTURE = "summary.png"
_SET_ASIDE = re.compile(r"\.old-\d+$")
_NOT_SWEPT = ("run.", "launcher.", "monitor.", "profiler.", "resume", "checkpoint.", "debug.", "data.cache_dir")
_KEPT_METRICS = re.compile(r"step|tokens|loss.*|eval_.*|accept_.*|lr|grad_norm|tokens_per_s")


@dataclass(frozen=True)
class PointSummary:
    """How one run stands."""

    number: int
    """From 0, in the sweep's order."""
    name: str
    """Of its folder."""
    values: dict[str, Any]
    """Of the keys that differ between the runs."""
    status: str
    """``done``, ``diverged``, ``interrupted``, ``failed``, ``running`` or ``unfinished``."""
    exit_code: int | None
    objective: float | None
    """None unless the run is done and the number is finite."""
    message: str | None
    steps: int
    """Trained so far."""
    planned_steps: int | None
    training_seconds: float
    """Sum over all steps, those before a resume included."""
    metrics: dict[str, float]
    """Of the last step."""


def write_summary(folder: Path) -> str:
    """Write ``summary.json`` and ``summary.png`` into the folder; returns the table.

    Raises:
        ConfigError: there are no runs in it, or it cannot be written.
    """
    points = summarise(folder)
    if not points:
        raise ConfigError(
            f"{folder} holds no runs: give the folder of a sweep, such as sweeps/NAME, whose folders have a {CONFIG_FILE} each"
        )
    chosen = best(points)
    summary = {
        "folder": str(folder),
        "swept": swept_keys(points),
        "best": None if chosen is None else chosen.name,
        "points": [strict_json.encode(dataclasses.asdict(point)) for point in points],
    }
    from dist_mtp.monitor.sweep_plot import plot_sweep

    try:
        replace_text(folder / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
        plot_sweep(points, swept_keys(points), _is_search(folder), folder / PICTURE, title=folder.resolve().name)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}: {error.filename})") from error
    return f"{table(points)}\n\nwritten to {folder / SUMMARY} and {folder / PICTURE}"


def summarise(folder: Path) -> list[PointSummary]:
    """All runs of a folder, in the sweep's order, those that no sweep noted last."""
    records: dict[str, PointRecord] = {}
    for record in read_records(folder):
        records.setdefault(record.name, record)  # a point that was proposed again keeps its first number
    runs = {path.name for path in folder.iterdir() if _is_run(path)}
    order = sorted(records, key=lambda name: records[name].number) + sorted(runs - set(records), key=_natural)
    configs = {name: _config(folder / name) for name in order}
    values = _differing(configs, records)
    return [
        _summary(number, folder / name, configs[name], values[name], records.get(name))
        for number, name in enumerate(order)
    ]


def best(points: Sequence[PointSummary]) -> PointSummary | None:
    """The point with the least objective."""
    ended = [point for point in points if point.objective is not None]
    return min(ended, key=lambda point: point.objective or 0.0) if ended else None


def swept_keys(points: Sequence[PointSummary]) -> list[str]:
    return sorted({key for point in points for key in point.values})


def table(points: Sequence[PointSummary]) -> str:
    """One line per point, the best one marked, and what went wrong with those that failed."""
    keys, chosen = swept_keys(points), best(points)
    rows = [["", *(keys or ["run"]), "objective", "steps", "time", "status"]]
    for point in points:
        told = [_spelled(point.values.get(key)) for key in keys] or [point.name]
        objective = "-" if point.objective is None else f"{point.objective:.4f}"
        steps = f"{point.steps}/{'?' if point.planned_steps is None else point.planned_steps}"
        status = point.status + ("  best" if point is chosen else "")
        rows.append([str(point.number + 1), *told, objective, steps, duration(point.training_seconds), status])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]])
        for row in rows
    ]
    failures = [f"{point.number + 1}  {point.name}: {point.message}" for point in points if point.message]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def _is_run(path: Path) -> bool:
    if path.name.startswith(".") or _SET_ASIDE.search(path.name):
        return False
    return (path / CONFIG_FILE).is_file() or (path / RESULT).is_file()


def _is_search(folder: Path) -> bool:
    """Whether the order of points says something: each was chosen after the ones before."""
    with suppress(OSError, ValueError):
        return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["sweeper"] != "basic"
    return False


def _summary(
    number: int, run: Path, config: dict[str, Any], values: dict[str, Any], record: PointRecord | None
) -> PointSummary:
    result, rows, message = _read_run(run)
    status, exit_code, objective = "unfinished", None, None
    noted = record is not None and record.exit_code is not None
    if result is not None:
        status, exit_code, message = result["status"], result["exit_code"], result["message"] or message
        objective = result["objective"] if status == "done" else None
    elif _is_held(run):
        status = "running"
    if record is not None and noted and (result is None or (record.exit_code != 0 and exit_code == 0)):
        # Refused before it had a result of its own, or refused that result.
        status, exit_code, message, objective = record.status, record.exit_code, record.message or message, None
    last = rows[-1] if rows else {}
    usable = isinstance(objective, int | float) and math.isfinite(objective)
    return PointSummary(
        number=number,
        name=run.name,
        values=values,
        status=status,
        exit_code=exit_code,
        objective=objective if usable else None,
        message=message,
        steps=int(last.get("step", 0)),
        planned_steps=config.get("train", {}).get("steps"),
        training_seconds=round(sum(row.get("step_time", 0.0) for row in rows), 3),
        metrics={key: value for key, value in last.items() if _KEPT_METRICS.fullmatch(key)},
    )


def _read_run(run: Path) -> tuple[dict[str, Any] | None, list[dict[str, float]], str | None]:
    """Result, rows of metrics, and what is damaged: one bad file must not hide the other points."""
    result, rows, message = None, [], None
    try:
        result = read_result(run)
        rows = read_metrics(run / "metrics.jsonl")
    except FileNotFoundError:
        pass
    except DataError as error:
        message = str(error)
    return result, rows, message


def _is_held(run: Path) -> bool:
    try:
        lock_run_folder(run).close()
    except ConfigError:
        return True
    except OSError:
        pass
    return False


def _config(run: Path) -> dict[str, Any]:
    """The resolved configuration; empty if the run has none, or none that can be read."""
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        values = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}


def _differing(configs: Mapping[str, dict[str, Any]], records: Mapping[str, PointRecord]) -> dict[str, dict[str, Any]]:
    """Per run the values of the keys that are not the same in all. A section that was chosen by name counts as one key."""
    known = [config for config in configs.values() if config]
    keys: dict[str, None] = {}
    for config in known[1:]:
        keys |= dict.fromkeys(changed_keys(known[0], config))
    named = {key.split(".")[0] for key in keys if key.endswith(".name") and key.count(".") == 1}
    chosen = {
        (key.split(".")[0] if key.split(".")[0] in named else key)
        for key in keys
        if not key.startswith(_NOT_SWEPT) and key != "model.vocab_size"
    }
    given = {name: _overrides(record) for name, record in records.items()}
    # Points that were refused have no configuration, only what the command line said about them.
    told = {key for name, config in configs.items() if not config for key in given.get(name, {})}
    shared = {key for key in told if len({str(values.get(key)) for values in given.values()}) == 1}
    chosen |= {key for key in told - shared if not key.startswith(_NOT_SWEPT)}
    return {
        name: {
            key: _lookup(config, f"{key}.name" if key in named else key) if config else given.get(name, {}).get(key)
            for key in sorted(chosen)
        }
        for name, config in configs.items()
    }


def _overrides(record: PointRecord) -> dict[str, Any]:
    pairs = [override.lstrip("+").partition("=") for override in record.overrides]
    return {key: _number(value) for key, _, value in pairs}


def _number(text: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _spelled(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _natural(name: str) -> list[tuple[int, float, str]]:
    """Sorts ``depth=2`` before ``depth=10``."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", name)
    return [(0, float(part), "") if index % 2 else (1, 0.0, part) for index, part in enumerate(parts)]
