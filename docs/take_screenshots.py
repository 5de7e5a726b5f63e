"""Pictures of docs/monitoring.md and docs/sweeps.md: TensorBoard in a browser over an example run and a sweep, and what
``dist-mtp plot`` draws.

    python docs/take_screenshots.py           # about six minutes on two cores; needs chromium, chromium-driver, Optuna

Everything is trained for this; ``--runs FOLDER`` keeps the runs, and does not repeat those that it holds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from PIL import Image, ImageChops  # noqa: E402 - comes with matplotlib
from support.browser import missing_programs  # noqa: E402 - imports need the path of this checkout
from support.tensorboard_page import TensorBoardPage, tensorboard_page  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
MAX_BYTES = 250_000
COLOURS = 128
WINDOW = 1500, 1000
EXAMPLE = (
    "mtp.depth=2",
    "precision=fp8",
    "train.steps=200",
    "train.micro_batch_size=2",
    "train.micro_batches=8",
    "eval.every=50",
    "monitor.timeline_every=50",
)
SWEEP = (
    "-m",
    "mtp.depth=0,1",
    "optim.lr=1e-3,2e-3,4e-3",
    "train.steps=60",
    "parallel.pp=1",
    "monitor.timeline_every=0",
)
SEARCH = (
    "-m",
    "hydra/sweeper=optuna",
    "hydra.sweeper.n_trials=10",
    "optim.lr=tag(log,interval(1e-4,1e-1))",
    "mtp.depth=0,1",
    *SWEEP[3:],
)
PLOTTED = ("losses", "mtp", "experts", "expert_load_spread", "pipeline", "fp8")
TIMEOUT_S = 1200.0
SETTLE_S = 2.0
"""From a complete tab until its animations have ended."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="keep the run folders here, and do not repeat runs that it holds")
    arguments = parser.parse_args()
    if missing := missing_programs():
        sys.exit(f"not installed: {', '.join(missing)} (Debian: chromium chromium-driver)")
    with tempfile.TemporaryDirectory(prefix="dist_mtp_screenshots_") as scratch:
        folder = (arguments.runs or Path(scratch)).resolve()
        run, sweep, search = folder / "runs" / "example", folder / "sweep", folder / "search"
        if not (run / "result.json").exists():
            train(run, EXAMPLE)
        for points, overrides in ((sweep, SWEEP), (search, SEARCH)):
            if not (points / "summary.json").exists():
                train(points, overrides)
        with tensorboard_page(run.parent, *WINDOW) as board:
            take_run(board)
        with tensorboard_page(sweep, *WINDOW) as board:
            take_sweep(board)
        plot(run)
        copy(sweep / "summary.png", "sweep_grid")
        copy(search / "summary.png", "sweep_search")
    return 0


def train(run: Path, overrides: tuple[str, ...]) -> None:
    """``dist-mtp train`` into ``run``, a run or the folder of a sweep."""
    call("train", *overrides, f"run.dir={run}", f"data.cache_dir={run.parent / 'data'}")


def call(*arguments: str) -> None:
    print("dist-mtp", *arguments, flush=True)
    subprocess.run(
        [sys.executable, "-m", "dist_mtp", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        timeout=TIMEOUT_S,
        check=True,
    )


def take_run(board: TensorBoardPage) -> None:
    """The tabs of one run."""
    board.keep_outliers()
    board.page.resize(1500, 1600)
    board.charts(lambda charts: all(chart.lines for chart in charts))
    take(board, "custom_scalars")
    board.act("tf-category-paginated-view", 4, "scrollIntoView()")
    take(board, "custom_scalars_below")
    board.page.resize(1740, 1600)
    board.images(2)
    board.act("paper-checkbox", 0, "click()")  # "Show actual image size"
    take(board, "images")
    board.page.resize(1500, 1600)
    board.histograms(5)
    take(board, "histograms")
    board.texts(2)
    take(board, "text")


def take_sweep(board: TensorBoardPage) -> None:
    """The table of its points, without the settings that they have in common."""
    board.page.resize(1700, 560)
    board.hparams(rows=6)
    for place in (4, 3, 2):  # the first two differ between points, and TensorBoard ticks five
        board.act("paper-checkbox", place, "click()")
    take(board, "hparams")


def take(board: TensorBoardPage, name: str) -> None:
    """Write the window as ``tensorboard_NAME.png``, without what is empty below."""
    time.sleep(SETTLE_S)
    path = PICTURES / f"tensorboard_{name}.png"
    board.page.screenshot(path)
    with Image.open(path) as full:
        picture = full.convert("RGB")
    # Rows that equal the last one are background.
    last_row = picture.crop((0, picture.height - 1, picture.width, picture.height)).resize(picture.size)
    *_, bottom = ImageChops.difference(picture, last_row).getbbox() or (0, 0, 0, picture.height)
    write(picture.crop((0, 0, picture.width, bottom)), path)


def plot(run: Path) -> None:
    """The pictures of ``dist-mtp plot`` that the page shows."""
    call("plot", str(run))
    sources = {f"plot_{name}": run / "plots" / f"{name}.png" for name in PLOTTED} | {
        "run_timeline": run / "plots" / "timeline.png"
    }
    for name, source in sources.items():
        copy(source, name)


def copy(source: Path, name: str) -> None:
    with Image.open(source) as picture:
        write(picture.convert("RGB"), PICTURES / f"{name}.png")


def write(picture: Image.Image, path: Path) -> None:
    """With a palette, which letters and lines need no more of, and which takes a third of the bytes."""
    picture.quantize(COLOURS).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {size / 1000:.0f} kB{' IS TOO LARGE' if size > MAX_BYTES else ''}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
