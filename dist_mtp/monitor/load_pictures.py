"""How the experts' loads spread, layer by layer, as PNG: what TensorBoard's histograms of a run show, as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dist_mtp.monitor.expert_loads import Spread
from dist_mtp.monitor.run_charts import layer_name
from dist_mtp.monitor.run_pictures import COLOURS, FAINT, panel_grid, save, tidy

NAME = "expert_load_spread"


def draw_spreads(spreads: Mapping[int, Spread], path: Path, num_layers: int | None = None) -> None:
    """A panel per layer: all experts pale, the middle half of them strong, the median as a line.

    Args:
        num_layers: of the trunk, where known; layers from there on are called after their MTP modules.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    legend = [
        Patch(facecolor=COLOURS[0], alpha=0.2, label="all experts"),
        Patch(facecolor=COLOURS[0], alpha=0.45, label="the middle half"),
        Line2D([], [], color=COLOURS[0], linewidth=1.2, label="median"),
    ]
    figure, places = panel_grid(len(spreads), legend)
    largest = max(quantiles[-1] for spread in spreads.values() for quantiles in spread.quantiles_SQ)
    for axes, (layer, spread) in zip(places, spreads.items(), strict=True):
        _draw_layer(axes, spread)
        axes.set_ylim(0, 1.05 * largest)  # alike, so that layers compare
        tidy(axes, f"load over the mean load, {layer_name(layer, num_layers)}")
    save(figure, path)


def _draw_layer(axes: Any, spread: Spread) -> None:
    least, low, median, high, largest = np.array(spread.quantiles_SQ).T
    axes.axhline(1.0, color=FAINT, linewidth=0.6, linestyle=(0, (4, 3)))
    axes.fill_between(spread.steps, least, largest, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.fill_between(spread.steps, low, high, color=COLOURS[0], alpha=0.3, linewidth=0)
    axes.plot(spread.steps, median, color=COLOURS[0], linewidth=1.0)
