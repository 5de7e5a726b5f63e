"""What a sweep notes about each of its points, one small file a point, so that points may run anywhere and at any time.

``<sweep>/.points/<number>.json`` says which run folder a point has and how it ended, also for points that were refused
before there was a folder. Losses are in the points' own ``result.json`` and ``metrics.jsonl``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from dist_mtp.errors import DataError
from dist_mtp.monitor.atomic import replace_text

RECORDS = ".points"


@dataclass(frozen=True)
class PointRecord:
    number: int
    """From 0, in the order in which the sweeper made the points."""
    name: str
    """Of its folder inside the sweep's."""
    overrides: tuple[str, ...]
    exit_code: int | None = None
    """None while it runs, and for ever if the machine went down."""
    status: str = "running"
    """``running``, ``done``, ``finished before``, or as in ``result.json``."""
    objective: float | None = None
    message: str | None = None
    seconds: float | None = None
    """Wall-clock time in this start of the sweep."""
    pid: int | None = None
    """Process of the point on ``host`` while it runs."""
    host: str | None = None


def write_record(sweep: Path, record: PointRecord) -> None:
    """Replace what is known of a point."""
    text = json.dumps(dataclasses.asdict(record), indent=2, allow_nan=False)
    replace_text(sweep / RECORDS / f"{record.number}.json", text + "\n")


def read_records(sweep: Path) -> list[PointRecord]:
    """All points so far, in their order; none for a folder that no sweep wrote.

    Raises:
        DataError: a file is damaged.
    """
    records = []
    for file in (sweep / RECORDS).glob("[0-9]*.json"):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            records.append(PointRecord(**{**values, "overrides": tuple(values["overrides"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file} is damaged: {error}; delete it") from error
    return sorted(records, key=lambda record: record.number)
