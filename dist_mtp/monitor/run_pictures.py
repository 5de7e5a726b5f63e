"""Charts of one run or several as PNG: panels as wide as a third of a page. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_mtp.monitor.charts import CATEGORIES, Category, Chart
from dist_mtp.monitor.run_charts import Line, Run, lines, points_of

COLOURS = ("#2f6fb2", "#c9573c", "#3f9b5a", "#e08a1e", "#8a5fb0", "#4fa7a7", "#b0568a", "#8c8c8c")
_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1, 1, 3)))
INK, FAINT, _GRID = "#222222", "#666666", "#e4e4e4"
PANEL_INCHES, COLUMNS = (2.3, 1.8), 3
TITLE_SIZE, TEXT_SIZE = 7.5, 7.0
"""Points."""
_TITLE_CHARACTERS = 34
"""Of one line above a panel."""
DPI = 300
_MIN_LOG_RANGE = 10.0
"""Largest over smallest value from which a logarithmic axis has ticks to read."""


def draw_runs(runs: Mapping[str, Run], folder: Path) -> list[Path]:
    """Write a picture of every category of charts that at least one run has numbers for.

    One run has a colour per line. Several runs lie over each other, a colour per run and a dash pattern per line.

    Args:
        runs: by their names in the legend.

    Raises:
        OSError: the folder cannot be written.
    """
    points = {name: points_of(run) for name, run in runs.items()}
    written: list[Path] = []
    for category in CATEGORIES:
        drawn = [
            (chart, {name: lines(chart, points[name], run.num_layers) for name, run in runs.items()})
            for chart in category.charts
        ]
        filled = [(chart, by_run) for chart, by_run in drawn if any(by_run.values())]
        if filled:
            written.append(folder / f"{category.name}.png")
            _draw(category, list(runs), filled, written[-1])
    return written


def _draw(
    category: Category, runs: Sequence[str], panels: Sequence[tuple[Chart, Mapping[str, list[Line]]]], path: Path
) -> None:
    labels = _labels([by_run for _, by_run in panels])
    legend = _legend(runs, labels)
    figure, places = panel_grid(len(panels), legend)
    for axes, (chart, by_run) in zip(places, panels, strict=True):
        for place, run in enumerate(runs):
            for line in by_run[run]:
                which = labels.index(line.label) if line.label in labels else 0
                colour, style = _look(place, which, len(runs), len(labels))
                marker = "o" if line.sparse else ""
                axes.plot(
                    line.steps,
                    line.values,
                    color=colour,
                    linestyle=style,
                    linewidth=1.0,
                    marker=marker,
                    markersize=2,
                    clip_on=False,  # or half of what is at 0 would be cut off
                )
        _scale(axes, chart, [value for found in by_run.values() for line in found for value in line.values])
        tidy(axes, chart.title)
    save(figure, path)


def panel_grid(count: int, legend: Sequence[Any]) -> tuple[Any, list[Any]]:
    """A figure with ``count`` pairs of axes, :data:`COLUMNS` in a row, and the legend below them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    width = PANEL_INCHES[0] * columns
    # An entry's line takes 0.4 inch, a letter half its height.
    widest = max((0.4 + len(entry.get_label()) * TEXT_SIZE / 72 / 2 for entry in legend), default=1.0)
    legend_columns = max(1, min(len(legend), int(width / widest)))
    legend_rows = -(-len(legend) // legend_columns) if len(legend) > 1 else 0
    figure = Figure(figsize=(width, PANEL_INCHES[1] * rows + 0.15 * legend_rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    places = [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]
    if legend_rows:
        figure.legend(
            handles=legend, loc="outside lower center", ncols=legend_columns, fontsize=TEXT_SIZE, frameon=False
        )
    return figure, places


def save(figure: Any, path: Path) -> None:
    """Raises OSError if the folder cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")


def tidy(axes: Any, title: str) -> None:
    """Small labels, faint rules, and nothing else that draws the eye."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(textwrap.fill(title, _TITLE_CHARACTERS), loc="left", fontsize=TITLE_SIZE, color=INK)
    axes.set_xlabel("step", fontsize=TEXT_SIZE, color=FAINT, labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(which="both", labelsize=TEXT_SIZE, colors=FAINT, length=0, pad=2)
    axes.grid(color=_GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _scale(axes: Any, chart: Chart, values: Sequence[float]) -> None:
    """A logarithmic axis where it has ticks to read and every value a place, else one from the chart's bottom."""
    finite = [value for value in values if math.isfinite(value)]
    least, largest = min(finite, default=0.0), max(finite, default=0.0)
    if chart.log_scale and least > 0 and largest / least > _MIN_LOG_RANGE:
        axes.set_yscale("log")
    elif chart.bottom is not None:
        # All-zero lines get an axis up to 1: matplotlib's own would magnify nothing.
        axes.set_ylim(chart.bottom, chart.bottom + (1.05 * (largest - chart.bottom) or 1.0))


def _labels(panels: Sequence[Mapping[str, Sequence[Line]]]) -> list[str]:
    """What the legend must tell apart; a quantity that has axes of its own is named by their title."""
    by_panel = [list(dict.fromkeys(line.label for found in by_run.values() for line in found)) for by_run in panels]
    return list(dict.fromkeys(label for labels in by_panel if len(labels) > 1 for label in labels))


def _look(run: int, line: int, num_runs: int, num_lines: int) -> tuple[str, Any]:
    """Colour and dash pattern."""
    if num_runs == 1:
        return _colour(line, num_lines), "-"
    return _colour(run, num_runs), _STYLES[line % len(_STYLES)]


def _colour(place: int, count: int) -> str:
    """One of ``count`` colours that differ."""
    if count <= len(COLOURS):
        return COLOURS[place]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # Both ends of the map are nearly black.
    return to_hex(colormaps["turbo"](0.05 + 0.9 * place / (count - 1)))


def _legend(runs: Sequence[str], labels: Sequence[str]) -> list[Any]:
    """Of one run its lines; of several the runs, and the lines if there is more than one kind."""
    from matplotlib.lines import Line2D

    def entry(label: str, colour: str, style: Any) -> Any:
        return Line2D([], [], color=colour, linestyle=style, linewidth=1.2, label=label)

    if len(runs) == 1:
        return [entry(label, *_look(0, place, 1, len(labels))) for place, label in enumerate(labels)]
    entries = [entry(run, _colour(place, len(runs)), "-") for place, run in enumerate(runs)]
    if len(labels) > 1:
        entries += [entry(label, FAINT, _STYLES[place % len(_STYLES)]) for place, label in enumerate(labels)]
    return entries
