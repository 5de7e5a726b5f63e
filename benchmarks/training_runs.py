"""What benchmarks that train have in common: a run in a process of its own, and how its curves are drawn."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
INK, FAINT, RULE = "#222222", "#666666", "#c8ccd0"


def train_alone(run: Path, overrides: Sequence[str], timeout_s: float) -> None:
    """Train into the folder ``run`` on one thread, from scratch; its tokenised corpus is kept beside it."""
    subprocess.run(
        [
            *(sys.executable, "-m", "dist_mtp", "train", *overrides),
            *(f"run.dir={run}", f"data.cache_dir={run.parent / 'data'}", "resume=never"),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        timeout=timeout_s,
        check=True,
    )


def prepare(axes: Axes, title: str) -> None:
    """Axes with a title and faint rules, and nothing else that draws the eye."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.grid(color=RULE, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    axes.xaxis.label.set(color=FAINT, fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
