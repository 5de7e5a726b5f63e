"""Charts of one run or several as PNG, in a size for papers. matplotlib is imported when a picture is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_mtp.monitor.run_charts import CHARTS, Chart, Line, Row, lines, with_derived

COLOURS = ("#2f6fb2", "#c9573c", "#3f9b5a", "#e08a1e", "#8a5fb0", "#4fa7a7", "#b0568a", "#8c8c8c")
_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1, 1, 3)))
INK, FAINT, _GRID = "#222222", "#666666", "#e4e4e4"
_PANEL_INCHES = (4.6, 3.2)
_LEGEND_COLUMNS = 5
DPI = 200
_MIN_LOG_RANGE = 10.0
"""Largest over smallest value from which a logarithmic axis has ticks to read."""


def draw_runs(runs: Mapping[str, Sequence[Row]], folder: Path) -> list[Path]:
    """Write a picture of every chart that at least one run has numbers for.

    One run has a colour per line. Several runs lie over each other, a colour per run and a dash pattern per line.

    Args:
        runs: name in the legend -> rows of ``metrics.jsonl``.

    Raises:
        OSError: the folder cannot be written.
    """
    runs = {name: [with_derived(row) for row in rows] for name, rows in runs.items()}
    written: list[Path] = []
    for chart in CHARTS:
        drawn = [(panel, {name: lines(panel, rows) for name, rows in runs.items()}) for panel in chart.panels]
        if any(found for _, by_run in drawn for found in by_run.values()):
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{chart.name}.png")
            _draw(chart, list(runs), [by_run for _, by_run in drawn], written[-1])
    return written


def _draw(chart: Chart, runs: Sequence[str], panels: Sequence[Mapping[str, Sequence[Line]]], path: Path) -> None:
    """One picture; panels without any line are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    filled = [(panel, by_run) for panel, by_run in zip(chart.panels, panels, strict=True) if any(by_run.values())]
    labels = _labels([by_run for _, by_run in filled])
    width, height = _PANEL_INCHES
    legend = _legend(runs, labels)
    legend_rows = -(-len(legend) // _LEGEND_COLUMNS)
    figure = Figure(figsize=(width * len(filled), height + 0.22 * legend_rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (panel, by_run) in zip(figure.subplots(1, len(filled), squeeze=False)[0], filled, strict=True):
        for place, run in enumerate(runs):
            for line in by_run[run]:
                colour, style = _look(place, labels.index(line.label) if line.label in labels else 0, len(runs))
                marker = "o" if line.sparse else ""
                axes.plot(
                    line.steps, line.values, color=colour, linestyle=style, marker=marker, markersize=3, linewidth=1.1
                )
        values = [value for found in by_run.values() for line in found for value in line.values]
        if panel.log_scale and min(values) > 0 and max(values) / min(values) > _MIN_LOG_RANGE:
            axes.set_yscale("log")
        axes.set_title(panel.title, loc="left", fontsize=9, color=INK)
        axes.set_xlabel("step", fontsize=8, color=FAINT)
        tidy(axes)
    if len(legend) > 1:
        figure.legend(
            handles=legend,
            loc="outside lower center",
            ncols=min(len(legend), _LEGEND_COLUMNS),
            fontsize=8,
            frameon=False,
        )
    figure.savefig(path, dpi=DPI, facecolor="white")


def _labels(panels: Sequence[Mapping[str, Sequence[Line]]]) -> list[str]:
    """What the legend must tell apart; a quantity that has axes of its own is named by their title."""
    by_panel = [list(dict.fromkeys(line.label for found in by_run.values() for line in found)) for by_run in panels]
    return list(dict.fromkeys(label for labels in by_panel if len(labels) > 1 for label in labels))


def _look(run: int, line: int, num_runs: int) -> tuple[str, Any]:
    """Colour and dash pattern."""
    if num_runs == 1:
        return COLOURS[line % len(COLOURS)], _STYLES[line // len(COLOURS) % len(_STYLES)]
    return COLOURS[run % len(COLOURS)], _STYLES[line % len(_STYLES)]


def _legend(runs: Sequence[str], labels: Sequence[str]) -> list[Any]:
    """Of one run its lines; of several the runs, and the lines if there is more than one kind."""
    from matplotlib.lines import Line2D

    def entry(label: str, colour: str, style: Any) -> Any:
        return Line2D([], [], color=colour, linestyle=style, linewidth=1.4, label=label)

    if len(runs) == 1:
        return [entry(label, *_look(0, place, 1)) for place, label in enumerate(labels)]
    entries = [entry(run, COLOURS[place % len(COLOURS)], "-") for place, run in enumerate(runs)]
    if len(labels) > 1:
        entries += [entry(label, FAINT, _STYLES[place % len(_STYLES)]) for place, label in enumerate(labels)]
    return entries


def tidy(axes: Any) -> None:
    """Faint rules and small labels, and nothing else that draws the eye."""
    axes.tick_params(which="both", labelsize=8, colors=FAINT, length=0)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
