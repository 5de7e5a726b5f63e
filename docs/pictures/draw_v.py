"""Draws ``v.svg``: the V placement with four pipeline ranks.

python docs/pictures/draw_v.py [FILE]     # .svg (default) or .png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

RANKS = 4
WIDTH, HEIGHT, STEP_X, STEP_Y = 1.72, 0.98, 2.15, 1.42
INK, LANE, LAYERS, ENDS = "#1f2933", "#f3f5f7", "#dbe7f3", "#f9dfb4"
FORWARD, BACKWARD, SHARED = "#1f66a8", "#9aa5b1", "#b26a00"


def center(stage: int) -> tuple[float, float]:
    """Middle of a stage's box: time of the forward goes right, ranks go down."""
    rank = min(stage, 2 * RANKS - 1 - stage)
    return stage * STEP_X, -rank * STEP_Y


def draw_lanes(axes: Axes) -> None:
    right = (2 * RANKS - 1) * STEP_X + WIDTH / 2 + 0.35
    for rank in range(RANKS):
        y = -rank * STEP_Y
        lane = FancyBboxPatch((-2.2, y - 0.6), right + 2.2, 1.2, boxstyle="round,pad=0,rounding_size=0.08")
        lane.set(facecolor=LANE, edgecolor="none", zorder=0)
        axes.add_patch(lane)
        axes.text(-2.05, y, f"rank {rank}", va="center", ha="left", fontsize=11, weight="bold", color=INK)


def draw_stage(axes: Axes, stage: int) -> None:
    x, y = center(stage)
    last = 2 * RANKS - 1
    box = FancyBboxPatch(
        (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.07", linewidth=1.1
    )
    box.set(facecolor=ENDS if stage in (0, last) else LAYERS, edgecolor=INK, zorder=2)
    axes.add_patch(box)
    content = {0: "embedding\nlayers", last: "layers, norm,\nhead, MTP"}.get(stage, "layers")
    axes.text(x, y + 0.33, f"stage {stage}", va="center", ha="center", fontsize=8, color="#52606d", zorder=3)
    axes.text(x, y - 0.1, content, va="center", ha="center", fontsize=8.5, color=INK, linespacing=1.15, zorder=3)


def draw_hop(axes: Axes, stage: int) -> None:
    """Hidden states from ``stage`` to the next one, and their gradient back."""
    (x0, y0), (x1, y1) = center(stage), center(stage + 1)
    # One arrow on each side of the line between the two boxes.
    if y0 == y1:
        ends = [
            ((x0 + WIDTH / 2, y0 + 0.1), (x1 - WIDTH / 2, y1 + 0.1)),
            ((x1 - WIDTH / 2, y1 - 0.1), (x0 + WIDTH / 2, y0 - 0.1)),
        ]
    else:
        down = y1 < y0
        side0, side1 = (-HEIGHT / 2, HEIGHT / 2) if down else (HEIGHT / 2, -HEIGHT / 2)
        forward = ((x0 + 0.52, y0 + side0), (x1 - 0.28, y1 + side1))
        backward = ((x1 - 0.52, y1 + side1), (x0 + 0.28, y0 + side0))
        ends = [forward, backward]
    for (start, stop), color, style in zip(ends, (FORWARD, BACKWARD), ("-", (0, (3, 2))), strict=True):
        arrow = FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=11, linewidth=1.5, shrinkA=1, shrinkB=1)
        arrow.set(color=color, linestyle=style, zorder=1)
        axes.add_patch(arrow)


def draw_sharing(axes: Axes) -> None:
    """The link between the two ends of the V."""
    (x0, y), (x1, _) = center(0), center(2 * RANKS - 1)
    left, right = x0 + WIDTH / 2, x1 - WIDTH / 2
    axes.plot([left, right], [y, y], color=SHARED, linewidth=2.6, solid_capstyle="butt", zorder=1)
    axes.text(
        (left + right) / 2,
        y + 0.22,
        "one embedding Parameter with one .grad, used by both stages: no copy, no exchange",
        va="center",
        ha="center",
        fontsize=9.5,
        color=SHARED,
    )
    axes.text(
        (left + right) / 2,
        y - 0.22,
        "token ids of both ends come from the rank's own data, not through the pipeline",
        va="center",
        ha="center",
        fontsize=8.5,
        color="#52606d",
    )


def draw_legend(axes: Axes) -> None:
    y = -(RANKS - 1) * STEP_Y - 0.95
    entries = (("hidden states (forward)", FORWARD, "-"), ("their gradients (backward)", BACKWARD, (0, (3, 2))))
    for index, (label, color, style) in enumerate(entries):
        x = 2.6 + index * 4.6
        arrow = FancyArrowPatch((x, y), (x + 0.9, y), arrowstyle="-|>", mutation_scale=11, linewidth=1.5)
        arrow.set(color=color, linestyle=style)
        axes.add_patch(arrow)
        axes.text(x + 1.05, y, label, va="center", ha="left", fontsize=9, color=INK)


def main(file: Path) -> None:
    plt.rcParams.update({"svg.hashsalt": "dist_mtp", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(12, 4.3))
    draw_lanes(axes)
    for stage in range(2 * RANKS):
        draw_stage(axes, stage)
    for stage in range(2 * RANKS - 1):
        draw_hop(axes, stage)
    draw_sharing(axes)
    draw_legend(axes)
    axes.set(xlim=(-2.3, (2 * RANKS - 1) * STEP_X + WIDTH / 2 + 0.45), ylim=(-(RANKS - 1) * STEP_Y - 1.2, 0.7))
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(
        file, bbox_inches="tight", pad_inches=0.05, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else None
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("v.svg"))
