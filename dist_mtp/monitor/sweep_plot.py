"""The picture of a sweep. matplotlib is imported when it is drawn, never before."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_mtp.monitor.sweep_report import PointSummary

_COLOURS = ("#2f6fb2", "#e08a1e", "#3f9b5a", "#c9573c", "#7a5ea8", "#4aa3a3")
_BEST, _FAILED = "#2f6fb2", "#c9573c"
_INK, _FAINT, _RULE = "#222222", "#666666", "#c8ccd0"
_DPI = 130
_MAX_LINES = len(_COLOURS)
_MAX_PANELS = 3
_LOG_FROM = 20.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


def plot_sweep(points: Sequence[PointSummary], swept: Sequence[str], is_search: bool, path: Path, title: str) -> None:
    """Draw the objectives of all points and write them as PNG; points without one are crosses at the upper edge.

    A search is drawn by trial, with the best so far, beside one panel for each of its keys. A grid of one or two keys is
    drawn as lines over a key of numbers, or as a map if both keys have four values or more; any other as one dot per point.

    Args:
        swept: keys of ``PointSummary.values``.
        is_search: whether the points' order matters.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [key for key in swept if is_search][:_MAX_PANELS]
    rows = len(points) if not is_search else 0
    as_list = not is_search and not _axes_of_grid(points, swept)
    size = (5.6 + 3.2 * len(panels), max(3.6, 1.6 + 0.3 * rows) if as_list else 4.2)
    figure = Figure(figsize=(max(size[0], 8.0), size[1]), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    done = sum(point.objective is not None for point in points)
    figure.suptitle(
        f"{title}: {done} of {len(points)} points have an objective", x=0.01, ha="left", fontsize=11, color=_INK
    )
    if is_search:
        columns = figure.subplots(
            1, 1 + len(panels), sharey=True, squeeze=False, width_ratios=[1.6, *[1.0] * len(panels)]
        )
        _draw_trials(columns[0][0], points)
        for axes, key in zip(columns[0][1:], panels, strict=True):
            _draw_key(axes, points, key)
        columns[0][0].set_ylabel("objective (held-out loss, nats/token)", fontsize=9, color=_FAINT)
    elif as_list:
        _draw_list(figure.add_subplot(), points)
    else:
        _draw_grid(figure.add_subplot(), points, *_axes_of_grid(points, swept))
    figure.savefig(path, dpi=_DPI, facecolor="white")


def _axes_of_grid(points: Sequence[PointSummary], swept: Sequence[str]) -> list[str]:
    """Keys to draw over, the horizontal one first; empty if points are to be listed."""
    if not 1 <= len(swept) <= 2:
        return []
    # Most values first; of equally many, the key whose values are not whole numbers, such as a learning rate.
    numeric = [key for key in swept if _is_numeric(points, key) and len(_values(points, key)) > 1]
    numeric.sort(key=lambda key: (-len(_values(points, key)), all(isinstance(v, int) for v in _values(points, key))))
    if not numeric:
        return []
    others = [key for key in swept if key != numeric[0]]
    is_map = bool(others) and others[0] in numeric and len(_values(points, others[0])) >= 4
    if others and not is_map and len(_values(points, others[0])) > _MAX_LINES:
        return []
    return [numeric[0], *others]


def _draw_grid(axes: Any, points: Sequence[PointSummary], key: str, other: str | None = None) -> None:
    if other is not None and _is_numeric(points, other) and len(_values(points, other)) >= 4:
        _draw_map(axes, points, key, other)
        return
    _prepare(axes)
    lines: dict[Any, list[PointSummary]] = defaultdict(list)
    for point in points:
        lines[None if other is None else point.values[other]].append(point)
    for colour, value in zip(_COLOURS, [None] if other is None else _values(points, other), strict=False):
        members = sorted((m for m in lines[value] if m.values[key] is not None), key=lambda m: m.values[key])
        ended = [m for m in members if m.objective is not None]
        label = None if other is None else f"{other}={_text(value)}"
        axes.plot(
            [m.values[key] for m in ended],
            [m.objective for m in ended],
            "o-",
            color=colour,
            label=label,
            markersize=5,
            lw=1.4,
        )
        _mark_failed(axes, [m for m in members if m.objective is None], lambda m: m.values[key], colour)
    _scale(axes, _values(points, key))
    axes.set_xticks(_values(points, key) if len(_values(points, key)) <= 8 else axes.get_xticks())
    if len(_values(points, key)) <= 8:
        axes.set_xticklabels([_text(value) for value in _values(points, key)])
        axes.minorticks_off()
    axes.margins(x=0.08)
    axes.set_xlabel(key)
    axes.set_ylabel("objective (held-out loss, nats/token)", fontsize=9, color=_FAINT)
    if other is not None:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_map(axes: Any, points: Sequence[PointSummary], key: str, other: str) -> None:
    """Cells of equal size, the objective written into each; paler is better."""
    across, up = _values(points, key), _values(points, other)
    cells = [[math.nan] * len(across) for _ in up]
    texts = {}
    for point in points:
        if point.values[key] is None or point.values[other] is None:
            continue
        row, column = up.index(point.values[other]), across.index(point.values[key])
        cells[row][column] = math.nan if point.objective is None else point.objective
        texts[row, column] = point.status if point.objective is None else f"{point.objective:.3f}"
    axes.imshow(cells, cmap="Blues", origin="lower", aspect="auto", alpha=0.75)
    for (row, column), text in texts.items():
        failed = math.isnan(cells[row][column])
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=_FAILED if failed else _INK)
    axes.set_xticks(range(len(across)), [_text(value) for value in across])
    axes.set_yticks(range(len(up)), [_text(value) for value in up])
    axes.set_xlabel(key, fontsize=9, color=_FAINT)
    axes.set_ylabel(other, fontsize=9, color=_FAINT)
    axes.tick_params(colors=_FAINT, labelsize=9, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _draw_list(axes: Any, points: Sequence[PointSummary]) -> None:
    """One line per point, names on the left, the first on top."""
    _prepare(axes)
    for row, point in enumerate(points):
        if point.objective is not None:
            axes.plot([point.objective], [row], "o", color=_BEST, markersize=6)
        else:
            axes.text(
                0.01, row, point.status, color=_FAILED, fontsize=9, va="center", transform=axes.get_yaxis_transform()
            )
    axes.set_yticks(range(len(points)), [_shortened(point.name) for point in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.set_xlabel("objective (held-out loss, nats/token)")


def _draw_trials(axes: Any, points: Sequence[PointSummary]) -> None:
    _prepare(axes)
    ended = [point for point in points if point.objective is not None]
    axes.plot(
        [p.number + 1 for p in ended],
        [p.objective for p in ended],
        "o",
        color=_BEST,
        markersize=5,
        label="trial",
        zorder=3,
    )
    so_far, steps = math.inf, []
    for point in points:
        so_far = min(so_far, math.inf if point.objective is None else point.objective)
        steps.append(so_far if math.isfinite(so_far) else math.nan)
    numbers = [point.number + 1 for point in points]
    axes.step(numbers, steps, where="post", color=_COLOURS[1], lw=1.4, label="best so far")
    failed = [point for point in points if point.objective is None]
    _mark_failed(axes, failed, lambda point: point.number + 1, _FAILED, label="no objective")
    axes.set_xlabel("trial")
    axes.set_xlim(0.4, len(points) + 0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.legend(frameon=False, fontsize=8.5, labelcolor=_INK, ncols=3, loc="outside upper right")


def _draw_key(axes: Any, points: Sequence[PointSummary], key: str) -> None:
    """Objective over one key of a search; later trials are darker."""
    _prepare(axes)
    known = [point for point in points if point.values.get(key) is not None]
    numeric = _is_numeric(points, key)
    texts = [_text(value) for value in _values(points, key)]

    def place(point: PointSummary) -> Any:
        return point.values[key] if numeric else texts.index(_text(point.values[key]))

    for point in (point for point in known if point.objective is not None):
        shade = 0.35 + 0.65 * point.number / max(1, len(points) - 1)
        axes.scatter([place(point)], [point.objective], s=28, color=_BEST, alpha=shade, linewidths=0, zorder=3)
    _mark_failed(axes, [point for point in known if point.objective is None], place, _FAILED)
    if numeric:
        _scale(axes, _values(points, key))
    if not numeric or (all(isinstance(value, int) for value in _values(points, key)) and len(texts) <= 6):
        axes.set_xticks(_values(points, key) if numeric else range(len(texts)), texts)
    axes.margins(x=0.12)
    axes.set_xlabel(key)


def _mark_failed(axes: Any, points: Sequence[PointSummary], place: Any, colour: str, label: str | None = None) -> None:
    """Crosses just below the upper edge, wherever the objectives of the others are."""
    if points:
        axes.plot(
            [place(point) for point in points],
            [0.97] * len(points),
            "x",
            color=colour,
            markersize=7,
            markeredgewidth=1.8,
            label=label,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )


def _scale(axes: Any, values: Sequence[Any]) -> None:
    if min(values) <= 0 or (max(values) / min(values) < _LOG_FROM and not _is_geometric(values)):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    few_decades = max(values) / min(values) <= 100
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if few_decades else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def _is_geometric(values: Sequence[Any]) -> bool:
    """Three or more values, not all whole, that grow by about one factor."""
    if len(values) < 3 or min(values) <= 0 or all(isinstance(value, int) for value in values):
        return False
    factors = [after / before for before, after in itertools.pairwise(values)]
    return min(factors) > 1.5 and max(factors) / min(factors) < 1.5


def _prepare(axes: Any) -> None:
    axes.grid(color=_RULE, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_FAINT, labelsize=9, length=0)
    axes.xaxis.label.set(color=_FAINT, fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.margins(y=0.12)


def _is_numeric(points: Sequence[PointSummary], key: str) -> bool:
    values = [point.values.get(key) for point in points if point.values.get(key) is not None]
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _values(points: Sequence[PointSummary], key: str) -> list[Any]:
    """Distinct values, rising."""
    found = {_text(point.values[key]): point.values[key] for point in points if point.values.get(key) is not None}
    return sorted(found.values(), key=lambda value: (value, "") if _is_numeric(points, key) else (0, str(value)))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shortened(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."
