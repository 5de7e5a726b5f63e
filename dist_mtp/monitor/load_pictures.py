"""How the experts' loads spread, layer by layer, as PNG: what TensorBoard's histograms of a run hold, as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_mtp.monitor.run_pictures import COLOURS, DPI, FAINT, INK, tidy
from dist_mtp.monitor.tags import LOAD_SHARE_TAG

NAME = "expert_load_spread"
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_PANEL_INCHES, _COLUMNS = (2.5, 1.9), 4


@dataclass(frozen=True)
class Spread:
    """One layer's loads, over their mean."""

    steps: tuple[int, ...]
    quantiles_SQ: tuple[tuple[float, ...], ...]
    """Of the experts at each step, at :data:`QUANTILES`: the first and the last one are exact, those between are read off
    the histogram."""


def read_spreads(folder: Path) -> dict[int, Spread]:
    """Layer -> its loads at all steps that the TensorBoard folder has them for; empty if there is none."""
    if not folder.is_dir():
        return {}
    # Imported here: the rest of dist-mtp plot does without TensorBoard.
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={HISTOGRAMS: 0})  # 0: of every step
    events.Reload()
    prefix = LOAD_SHARE_TAG.partition("{")[0]
    spreads = {}
    for tag in events.Tags()[HISTOGRAMS]:
        if tag.startswith(prefix):
            found = events.Histograms(tag)
            quantiles = tuple(_quantiles(event.histogram_value) for event in found)
            spreads[int(tag.removeprefix(prefix))] = Spread(tuple(event.step for event in found), quantiles)
    return dict(sorted(spreads.items()))


def draw_spreads(spreads: Mapping[int, Spread], path: Path) -> None:
    """A panel per layer: all experts pale, the middle half of them strong, the median as a line.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(_COLUMNS, len(spreads))
    rows = -(-len(spreads) // columns)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(max(width * columns, 6.0), height * rows + 0.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, (layer, spread) in zip(panels, spreads.items(), strict=False):
        _draw_layer(axes, layer, spread)
    panels[0].set_ylim(0, 1.05 * max(quantiles[-1] for spread in spreads.values() for quantiles in spread.quantiles_SQ))
    for place in range(len(spreads), len(panels)):
        panels[place].set_visible(False)
        panels[place - columns].tick_params(labelbottom=True)
    figure.suptitle("load of an expert over the mean load", x=0.01, ha="left", fontsize=9, color=INK)
    figure.supxlabel("step", fontsize=8, color=FAINT)
    legend = [
        Patch(facecolor=COLOURS[0], alpha=0.2, label="all experts"),
        Patch(facecolor=COLOURS[0], alpha=0.45, label="the middle half"),
        Line2D([], [], color=COLOURS[0], linewidth=1.4, label="median"),
    ]
    figure.legend(handles=legend, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")


def _draw_layer(axes: Any, layer: int, spread: Spread) -> None:
    least, low, median, high, largest = np.array(spread.quantiles_SQ).T
    axes.axhline(1.0, color=FAINT, linewidth=0.7, linestyle=(0, (4, 3)))
    axes.fill_between(spread.steps, least, largest, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.fill_between(spread.steps, low, high, color=COLOURS[0], alpha=0.3, linewidth=0)
    axes.plot(spread.steps, median, color=COLOURS[0], linewidth=1.1)
    axes.set_title(f"layer {layer}", loc="left", fontsize=8, color=INK)
    tidy(axes)


def _quantiles(histogram: Any) -> tuple[float, ...]:
    """Of a TensorBoard histogram, whose bucket i counts the values up to ``bucket_limit[i]``."""
    reached = np.concatenate([[0.0], np.cumsum(histogram.bucket)])
    limits = np.concatenate([[histogram.min], np.array(histogram.bucket_limit)])
    # Where all loads are equal, the one bar reaches 0.5 beyond them on both sides.
    values = np.interp(np.array(QUANTILES) * reached[-1], reached, limits).clip(histogram.min, histogram.max)
    return tuple(values.tolist())
