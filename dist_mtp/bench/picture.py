"""The picture of ``dist-mtp bench precision``. matplotlib is imported when it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dist_mtp.bench.precision import PrecisionResult
from dist_mtp.bench.products import PRODUCTS
from dist_mtp.bench.table import shape_size, throughput_unit

_COLOURS = ("#8c8c8c", "#2f6fb2", "#c9573c", "#3f9b5a", "#8a5fb0")
_MARKERS = {"forward": "o", "input_grad": "^", "weight_grad": "s"}
_NAMES = {"forward": "forward", "input_grad": "input gradient", "weight_grad": "weight gradient"}
_INK, _FAINT = "#222222", "#666666"
_DPI = 130


def plot_precision(result: PrecisionResult, device: torch.device, path: Path) -> None:
    """Two panels as PNG, one row per shape: throughput of the three products together as bars, the error of each as a mark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    formats = list(result.layers[0].formats)
    colours = dict(zip(formats, _COLOURS, strict=False))
    figure = Figure(figsize=(13, 1.6 + 0.16 * (len(formats) + 1.5) * len(result.layers)), dpi=_DPI)
    figure.set_layout_engine("constrained", wspace=0.04)
    FigureCanvasAgg(figure)
    speeds, errors = figure.subplots(1, 2, sharey=True)
    scale, unit = throughput_unit(device)
    height = 0.8 / len(formats)
    for place, layer in enumerate(result.layers):
        for index, name in enumerate(formats):
            found = layer.formats[name]
            y = place + (index - (len(formats) - 1) / 2) * height
            speed = scale * len(PRODUCTS) * layer.flops / found.total_seconds()
            speeds.barh(y, speed, 0.9 * height, color=colours[name])
            for product, marker in _MARKERS.items():
                errors.plot(found.errors[product], y, marker, color=colours[name], markersize=4, alpha=0.8)
    labels = [f"{_shortened(layer.shape.names)}\n{shape_size(layer)}, {layer.rows:,} rows" for layer in result.layers]
    speeds.set_yticks(range(len(labels)), labels, fontsize=8, color=_INK)
    speeds.set_ylim(len(labels) - 0.5, -0.5)
    speeds.set_xlabel(f"{unit} of the three products, quantisation included", fontsize=9, color=_FAINT)
    errors.set_xscale("log")
    errors.set_xlabel("relative error against fp64", fontsize=9, color=_FAINT)
    for axes in (speeds, errors):
        _tidy(axes)
    figure.suptitle(f"{result.model} on {result.device}", x=0.01, ha="left", fontsize=11, color=_INK)
    _add_legend(figure, colours)
    figure.savefig(path, dpi=_DPI, facecolor="white")


def _shortened(names: tuple[str, ...]) -> str:
    """Names in one line of a label."""
    text = ", ".join(names)
    return text if len(text) <= 44 else f"{text[:42]}.."


def _tidy(axes: Any) -> None:
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=_FAINT)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _add_legend(figure: Any, colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
    handles += [
        Line2D([], [], linestyle="", marker=marker, color=_FAINT, markersize=5, label=_NAMES[product])
        for product, marker in _MARKERS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
