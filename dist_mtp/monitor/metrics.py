"""``metrics.jsonl``: one JSON object per step, appended as training goes, exact to the last bit of every float.

An evaluation's results are keys of the step after which it ran, so a step has exactly one row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_mtp.errors import DataError
from dist_mtp.monitor import strict_json
from dist_mtp.monitor.atomic import replace_text

METRICS = "metrics.jsonl"

TIMING_KEYS: frozenset[str] = frozenset(
    {"step_time", "tokens_per_s", "tflops_per_device", "mfu", "data_wait_s", "all_to_all_wait_s", "memory_gib"}
    | {"bubble", "bubble_plan", "pipeline_time", "p2p_wait_s"}
)
TIMING_PATTERN = re.compile(r"memory_rank_\d+_gib|stage_\d+_busy_share")
"""Keys, and patterns of keys, that depend on the machine and its mood, and on how ranks share the work; all others are
equal, bit for bit, in two runs of one configuration."""


class MetricsFile:
    """Appends rows to ``path``; a row that :meth:`write` returned from survives the death of this process.

    Args:
        resume_step: last step of the checkpoint that training continues from. Rows of later steps, which will be
            trained again, are dropped. None starts an empty file.

    Raises:
        DataError: an existing row is damaged (a torn last line is not: it is what a crash leaves, and is dropped).
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, resume_step: int | None) -> None:
        path = Path(path)
        kept = []
        if resume_step is not None and path.exists():
            # Original lines are kept as text, so that a resumed file equals an uninterrupted one byte for byte.
            kept = [line for line, row in _lines(path) if row["step"] <= resume_step]
        replace_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)  # 1: line-buffered, each row is flushed

    def write(self, row: Mapping[str, float] | Mapping[str, float | list[float]]) -> None:
        """Append one step's metrics; they must hold ``step`` (1-based).

        Raises:
            TypeError: a value is no plain number or list of them, such as a tensor.
            OSError: the disk is full.
        """
        self._file.write(strict_json.to_line(row))

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """All complete rows, in file order.

    Raises:
        DataError: a row other than the last is damaged.
        OSError: there is no such file.
    """
    return read_rows(path)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """As :func:`read_metrics`, for another file that a :class:`MetricsFile` wrote."""
    return [strict_json.decode(row) for _, row in _lines(Path(path))]


def comparable(row: Mapping[str, float]) -> dict[str, float]:
    """The part of a row that two equal runs must agree on exactly."""
    return {
        key: value for key, value in row.items() if key not in TIMING_KEYS and TIMING_PATTERN.fullmatch(key) is None
    }


def _lines(path: Path) -> list[tuple[str, dict[str, float]]]:
    """Each complete line with what it says; the last one may be torn and is left out then."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append((line, json.loads(line)))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(
                    f"{path}, line {number} of {len(lines)}, is damaged: {error}; delete that line"
                ) from error
    return rows
