"""What benchmarks that train have in common: a run in a process of its own, and how its curves are drawn."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
INK, FAINT, RULE = "#222222", "#666666", "#c8ccd0"


def parser_for(description: str, name: str, timeout_s: float) -> argparse.ArgumentParser:
    """Options of every such benchmark; ``name`` is that of its files."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / f"{name}.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "pictures" / f"{name}.png")
    parser.add_argument("--runs", type=Path, help="keep the run folders here, and do not repeat runs that it holds")
    parser.add_argument("--timeout", type=float, default=timeout_s, help="seconds for one run")
    return parser


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
