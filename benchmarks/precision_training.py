"""What BF16 and FP8 cost in loss: one model trained on real text in fp32, bf16 and fp8, for each of three seeds.

    python benchmarks/precision_training.py            # about an hour on two cores; --steps, --seeds and --runs change it

All runs train ``model=small`` with its experts and one MTP module on bytes of Shakespeare; runs of one seed start from the
same weights and see the same rows. FP8 is the emulated recipe, scales not restricted to powers of two. A fourth run a seed is
bf16 again, with the head's weight gradient summed in smaller pieces: what it differs from bf16 is chance. The table gives the relative gap of the mean training loss over the last steps; it, the curves and
the versions go to ``benchmarks/results/precision_training.json``, the picture to ``docs/pictures/precision_training.png``. Exit
code 1 unless the mean over the seeds is at most 0.1 % for bf16 against fp32 and 0.25 % for fp8 against bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402 - imports below need the path of this checkout
import yaml  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from training_runs import FAINT, INK, parser_for, prepare, train_alone  # noqa: E402

from dist_mtp.monitor.metrics import read_metrics  # noqa: E402

LAST = 100
"""Steps at the end over which losses are averaged; also the window of the picture's curves."""
OVERRIDES = (
    "model=small",
    "mtp.depth=1",
    "data=shakespeare",
    "tokenizer=bytes",
    "train.micro_batch_size=4",
    "train.micro_batches=1",
    "train.seq_len=128",
    "optim.lr=1e-4",
    "optim.warmup_steps=50",
    "optim.decay_steps=100",
    "eval.every=0",
    "eval.batches=32",
    "checkpoint.every=0",
    "monitor.tensorboard=false",
    "launcher=none",
    "parallel.pp=1",
    "device=cpu",
)
LOSSES = ("loss_main", "loss_mtp_1")


@dataclass(frozen=True)
class Variant:
    name: str
    label: str
    colour: str
    overrides: tuple[str, ...]


FP32 = Variant("fp32", "fp32", "#222222", ("precision=fp32",))
BF16 = Variant("bf16", "bf16", "#2f6fb2", ("precision=bf16",))
AGAIN = Variant("bf16_again", "bf16, other order of sums", "#9aa0a6", ("precision=bf16", "train.loss_chunk=100"))
FP8 = Variant("fp8", "fp8", "#c9573c", ("precision=fp8", "precision.fp8_backend=emulated"))
VARIANTS = (FP8, FP32, BF16, AGAIN)
"""Slowest first, so that two workers end together."""
PAIRS = {(BF16.name, FP32.name): 0.001, (FP8.name, BF16.name): 0.0025, (AGAIN.name, BF16.name): None}
"""(run, reference): bound of the relative gap, averaged over the seeds; the last pair shows what chance does."""

Rows = list[dict[str, float]]
Runs = dict[tuple[str, int], Rows]
"""By variant and seed."""


def main() -> int:
    parser = parser_for(__doc__.splitlines()[0], "precision_training", 5400)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="dist_mtp_precision_") as scratch:
        runs = train_all(arguments, arguments.runs or Path(scratch))
    gaps = {f"{run} against {reference}": summary(runs, run, reference, arguments.seeds) for run, reference in PAIRS}
    reached = all(
        bound is None or abs(gaps[f"{run} against {reference}"]["loss"]["mean"]) <= bound
        for (run, reference), bound in PAIRS.items()
    )
    print("\n".join(["", *table(gaps, arguments.seeds)]))
    result = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "numpy")}
        | {"python": platform.python_version()},
        "overrides": [*OVERRIDES, f"train.steps={arguments.steps}"],
        "seeds": arguments.seeds,
        "averaged_steps": LAST,
        "reached": reached,
        "relative_gaps": gaps,
        "losses": {f"{name}, seed {seed}": final_losses(rows) for (name, seed), rows in sorted(runs.items())},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    draw(runs, arguments.seeds, arguments.picture)
    print(f"\nwritten to {arguments.output} and {arguments.picture}")
    return 0 if reached else 1


def train_all(arguments: argparse.Namespace, folder: Path) -> Runs:
    keys = [(variant, seed) for seed in arguments.seeds for variant in VARIANTS]
    with ThreadPoolExecutor(arguments.workers) as pool:
        rows = pool.map(lambda key: train(*key, folder.resolve(), arguments.steps, arguments.timeout), keys)
        return {(variant.name, seed): one for (variant, seed), one in zip(keys, rows, strict=True)}


def train(variant: Variant, seed: int, folder: Path, steps: int, timeout_s: float) -> Rows:
    """Train in a process of its own, on one thread, and read what the run left."""
    run = folder / f"{variant.name}-{seed}"
    overrides = (*OVERRIDES, *variant.overrides, f"train.seed={seed}", f"train.steps={steps}")
    if not is_trained(run, overrides):
        print(f"training {steps} steps, {variant.label}, seed {seed} ...", flush=True)
        train_alone(run, overrides, timeout_s)
    return read_metrics(run / "metrics.jsonl")


def is_trained(run: Path, overrides: tuple[str, ...]) -> bool:
    """Whether ``run`` was trained to its end with these settings."""
    if not (run / "result.json").exists() or json.loads((run / "result.json").read_text())["status"] != "done":
        return False
    config = yaml.safe_load((run / "config.yaml").read_text())
    for override in overrides:
        key, value = override.split("=")
        found = config
        for part in key.split("."):
            found = found[part]
        found = found["name"] if isinstance(found, dict) else found  # a group is known by its name
        with contextlib.suppress(ValueError):
            found, value = float(found), float(value)
        if str(found).lower() != str(value):
            return False
    return True


def mean_loss(rows: Rows, key: str = "loss") -> float:
    return statistics.mean(row[key] for row in rows[-LAST:])


def final_losses(rows: Rows) -> dict[str, float]:
    """Means of the last steps, and on held-out text after the last."""
    means = {key: mean_loss(rows, key) for key in ("loss", *LOSSES)}
    return means | {"eval_loss_main": rows[-1]["eval_loss_main"]}


def summary(runs: Runs, run: str, reference: str, seeds: list[int]) -> dict[str, Any]:
    """Relative gap of each loss, by seed and their mean."""
    result = {}
    for key in ("loss", *LOSSES):
        gaps = [mean_loss(runs[run, seed], key) / mean_loss(runs[reference, seed], key) - 1 for seed in seeds]
        result[key] = {"by_seed": gaps, "mean": statistics.mean(gaps)}
    held_out = [runs[run, s][-1]["eval_loss_main"] / runs[reference, s][-1]["eval_loss_main"] - 1 for s in seeds]
    return result | {"eval_loss_main": {"by_seed": held_out, "mean": statistics.mean(held_out)}}


def table(gaps: dict[str, Any], seeds: list[int]) -> list[str]:
    head = "".join(f"  {f'seed {seed}':>8}" for seed in seeds)
    lines = [f"{f'relative gap, last {LAST} steps':<28}  {'loss':<14}{head}  {'mean':>8}"]
    for pair, by_loss in gaps.items():
        for key, gap in by_loss.items():
            cells = "".join(f"  {value:+8.3%}" for value in (*gap["by_seed"], gap["mean"]))
            lines.append(f"{pair:<28}  {key:<14}{cells}")
    return lines


def draw(runs: Runs, seeds: list[int], path: Path) -> None:
    """Losses of all runs, and beside them the relative gaps, which the losses are too close to show."""
    figure = Figure(figsize=(13, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"model=small (MoE), one MTP module, bytes of Shakespeare, {len(seeds)} seeds\n", fontsize=13, color=INK
    )
    losses, *gaps = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    for axes in (losses, *gaps):
        axes.set_xlabel("optimizer step")
    prepare(losses, "Training loss, main + MTP (mean of 25 steps)")
    for variant in (FP32, BF16, FP8):
        for seed in seeds:
            steps, curve = smooth(runs[variant.name, seed], window=25)
            label = variant.label if seed == seeds[0] else None
            losses.plot(steps, curve, color=variant.colour, linewidth=1.1, label=label)
    losses.legend(frameon=False, fontsize=9, labelcolor=INK)
    for axes, (variant, reference) in zip(gaps, ((BF16, FP32), (FP8, BF16)), strict=True):
        draw_gap(axes, runs, seeds, variant, reference)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def draw_gap(axes: Axes, runs: Runs, seeds: list[int], variant: Variant, reference: Variant) -> None:
    """Each seed faint, their mean strong, the bound dashed; grey: what chance alone does between two bf16 runs."""
    bound = PAIRS[variant.name, reference.name]
    assert bound is not None
    prepare(axes, f"{variant.label} / {reference.label} - 1, % (mean of {LAST} steps)")
    for compared, against in ((AGAIN, BF16), (variant, reference)):
        curves = list(gap_curves(runs, seeds, compared, against))
        for steps, curve in curves:
            axes.plot(steps, curve, color=compared.colour, linewidth=0.8, alpha=0.45)
        mean = np.mean([curve for _, curve in curves], axis=0)
        axes.plot(curves[0][0], mean, color=compared.colour, linewidth=2.2, label=f"{compared.label}, mean of seeds")
    for sign in (-1, 1):
        axes.axhline(sign * 100 * bound, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.axhline(0, color=FAINT, linewidth=0.6)
    axes.set_ylim(-160 * bound, 160 * bound)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left")


def gap_curves(
    runs: Runs, seeds: list[int], variant: Variant, reference: Variant
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for seed in seeds:
        steps, found = smooth(runs[variant.name, seed], window=LAST)
        _, expected = smooth(runs[reference.name, seed], window=LAST)
        yield steps, 100 * (found / expected - 1)


def smooth(rows: Rows, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Last step of each window, and the mean loss inside."""
    losses = [row["loss"] for row in rows]
    means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    return np.arange(window, len(losses) + 1), means


if __name__ == "__main__":
    sys.exit(main())
