"""The lines of a run's charts, from its ``metrics.jsonl``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_mtp.monitor.charts import Chart
from dist_mtp.monitor.tags import scalars


@dataclass(frozen=True)
class Run:
    """One run to draw."""

    rows: Sequence[Mapping[str, float]]
    """Of ``metrics.jsonl``."""
    num_layers: int | None = None
    """Of the trunk, where known: layers from there on are those of MTP modules."""


@dataclass(frozen=True)
class Line:
    """One quantity of one run against the step, in the unit of its tag."""

    label: str
    """What it is, alike in all runs."""
    steps: tuple[float, ...]
    values: tuple[float, ...]
    sparse: bool
    """Known at some steps only, so that its points are marked."""


Points = Sequence[tuple[float, Mapping[str, float]]]
"""Steps, and what TensorBoard shows at each: tag -> value."""


def points_of(run: Run) -> Points:
    return [(row["step"], scalars(row)) for row in run.rows]


def lines(chart: Chart, points: Points, num_layers: int | None = None) -> list[Line]:
    r"""The chart's lines for one run, in order of its patterns and of their numbers; quantities never measured have none.

    >>> points = [(1, {"loss/mtp_1": 5.0, "loss/mtp_2": 6.0}), (2, {"loss/mtp_1": 4.0})]
    >>> [(line.label, line.values) for line in lines(Chart("loss", {r"loss/mtp_(\d+)": "mtp {}"}), points)]
    [('mtp 1', (5.0, 4.0)), ('mtp 2', (6.0,))]
    """
    tags = {tag for _, values in points for tag in values}
    found = []
    for pattern, label in chart.lines.items():
        for match in sorted(filter(None, map(re.compile(pattern).fullmatch, tags)), key=_order):
            known = [(step, values[match[0]]) for step, values in points if match[0] in values]
            steps, values = zip(*known, strict=True)
            sparse = len(known) < len(points) or len(known) == 1
            found.append(Line(_label(label, match, num_layers), steps, values, sparse))
    return found


def layer_name(layer: int, num_layers: int | None) -> str:
    """Layers count on from the trunk's into the MTP modules.

    >>> layer_name(2, 3), layer_name(3, 3), layer_name(3, None)
    ('layer 2', 'mtp 1', 'layer 3')
    """
    is_module = num_layers is not None and layer >= num_layers
    return f"mtp {layer - num_layers + 1}" if is_module and num_layers is not None else f"layer {layer}"


def _label(label: str, match: re.Match[str], num_layers: int | None) -> str:
    if not match.groups():
        return label
    captured = match[1]
    if label == "layer {}":
        return layer_name(int(captured), num_layers)
    return label.format(int(captured) if captured.isdigit() else captured.replace("_", " "))


def _order(match: re.Match[str]) -> tuple[int, str]:
    captured = match[1] if match.groups() else ""
    return (int(captured), "") if captured.isdigit() else (0, captured)
