"""``result.json``: how a run ended, for sweeps and scripts that wait for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_mtp.errors import DataError
from dist_mtp.monitor import strict_json
from dist_mtp.monitor.atomic import replace_text

RESULT = "result.json"


def write_result(
    run_dir: str | Path,
    status: str,
    exit_code: int,
    metrics: Mapping[str, float],
    objective: float | None,
    message: str | None,
) -> None:
    """Replace the run's ``result.json`` atomically.

    Args:
        status: ``done``, ``diverged``, ``interrupted`` or ``failed``.
        exit_code: of the command, see ``dist_mtp.errors``.
        metrics: the last step's row, evaluation keys included.
        objective: the number a sweep minimises; None when the run did not get there.
        message: what went wrong and the fix, None when nothing did.
    """
    result = {
        "status": status,
        "exit_code": exit_code,
        "objective": strict_json.encode(objective),
        "message": message,
        "metrics": strict_json.encode(metrics),
    }
    replace_text(Path(run_dir) / RESULT, json.dumps(result, indent=2, allow_nan=False) + "\n")


def read_result(run_dir: str | Path) -> dict[str, Any] | None:
    """What :func:`write_result` wrote, or None when the run has not ended.

    Raises:
        DataError: the file is no JSON object; it was not written by dist_mtp.
    """
    path = Path(run_dir) / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; delete it") from error
    return {**result, **{key: strict_json.decode(result[key]) for key in ("objective", "metrics")}}
