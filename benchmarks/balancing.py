"""Auxiliary-loss-free load balancing on real text: one training run with the router's bias, one with the bias frozen at zero.

    python benchmarks/balancing.py            # about eight minutes on one core

Both runs train the same small model, three trunk layers and one MTP module, from the same weights on the same bytes of
Shakespeare. With E = 16 routed experts and K = 4 of them per token, the violation (largest expert load / mean load - 1,
arXiv 2408.15664) lies between 0 and E / K - 1 = 3, where every token visits one and the same expert. The table gives the
violation, the maximum over the MoE layers, and the losses; both go to ``benchmarks/results/balancing.json``, and the
picture to ``docs/pictures/balancing.png``. Exit code 1 unless the bias brings the mean of the last 100 steps under
0.3 while the frozen run stays above 1 in each step of its second half.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402 - imports below need the path of this checkout
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure, SubFigure  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from training_runs import FAINT, INK, parser_for, prepare, train_alone  # noqa: E402

from dist_mtp.monitor.metrics import read_metrics  # noqa: E402

BIAS_UPDATE_SPEED = "moe.bias_update_speed"
STEPS = 1000
TRUNK_LAYERS = 3
LAST = 100
"""Steps at the end of training over which the table's figures are taken."""
OVERRIDES = (
    "data=shakespeare",
    "tokenizer=bytes",
    "mtp.depth=1",
    "model=tiny",
    f"model.num_layers={TRUNK_LAYERS}",
    "model.n_routed_experts=16",
    "model.num_experts_per_tok=4",
    "model.moe_intermediate_size=64",
    "model.n_group=1",
    "model.topk_group=1",
    "train.micro_batch_size=8",
    "train.micro_batches=2",
    "train.seq_len=128",
    f"train.steps={STEPS}",
    # The bias moves by 0.001 a step, so routers must not drift faster than that: half the usual rate, and a long cosine.
    "optim.lr=1e-3",
    "optim.decay_steps=500",
    "eval.every=100",
    "eval.batches=16",
    "checkpoint.every=0",
    "launcher=none",
    "parallel.pp=1",
    "device=cpu",
)
BALANCED, UNBALANCED = 0.3, 1.0
"""Violations: reached by the run with the bias, never left by the frozen one."""
LOAD_SHARE = re.compile(r"layers\.(\d+)\.mlp\.gate\.load_share\[")
"""A router's loads of the step before, over their mean, as checkpoints name them."""


@dataclass(frozen=True)
class Variant:
    """One training run. ``name``: of its run folder; ``label``: in table and picture."""

    name: str
    label: str
    colour: str
    overrides: tuple[str, ...]


FROZEN = Variant("frozen", "bias frozen at 0", "#c9573c", (f"{BIAS_UPDATE_SPEED}=0",))
BIAS = Variant("bias", "bias moves by 0.001", "#2f6fb2", (f"{BIAS_UPDATE_SPEED}=0.001",))
VARIANTS = (FROZEN, BIAS)


@dataclass(frozen=True)
class Trained:
    """What a run left behind: its rows of ``metrics.jsonl``, and per router the share of choices of each expert."""

    variant: Variant
    rows: list[dict[str, float]]
    shares: dict[str, list[float]]

    @property
    def violations(self) -> list[float]:
        """Largest load / mean load - 1, maximum over layers, by step."""
        return [row["load_max_violation"] for row in self.rows]

    def summary(self) -> dict[str, Any]:
        last, final = self.violations[-LAST:], self.rows[-1]
        return {
            "variant": self.variant.label,
            "overrides": list(self.variant.overrides),
            f"violation_last_{LAST}": {"mean": statistics.mean(last), "min": min(last), "max": max(last)},
            f"share_of_last_{LAST}_below_{BALANCED}": statistics.mean(value < BALANCED for value in last),
            "violation_second_half_min": min(self.violations[STEPS // 2 :]),
            "loss_main": statistics.mean(row["loss_main"] for row in self.rows[-LAST:]),
            "loss_mtp_1": statistics.mean(row["loss_mtp_1"] for row in self.rows[-LAST:]),
            "eval_loss_main": final["eval_loss_main"],
            "eval_loss_mtp_1": final["eval_loss_mtp_1"],
            "expert_shares_last_step": self.shares,
            "seconds": round(sum(row["step_time"] for row in self.rows)),
        }


def main() -> int:
    parser = parser_for(__doc__.splitlines()[0], "balancing", 1800)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="dist_mtp_balancing_") as scratch:
        folder = arguments.runs or Path(scratch)
        trained = {variant: train(variant, folder, arguments.timeout) for variant in VARIANTS}

    summaries = [run.summary() for run in trained.values()]
    reached = (
        statistics.mean(trained[BIAS].violations[-LAST:]) < BALANCED
        and min(trained[FROZEN].violations[STEPS // 2 :]) > UNBALANCED
    )
    print("\n".join(["", *table(summaries)]))
    result = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "numpy")}
        | {"python": platform.python_version()},
        "overrides": OVERRIDES,
        "reached": reached,
        "runs": summaries,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    draw(list(trained.values()), arguments.picture)
    print(f"\nwritten to {arguments.output} and {arguments.picture}")
    return 0 if reached else 1


def train(variant: Variant, folder: Path, timeout_s: float) -> Trained:
    """Train below ``folder`` in a process of its own, on one thread, and read what the run left."""
    run = (folder / variant.name).resolve()
    if not (run / "result.json").exists():
        print(f"training {STEPS} steps, {variant.label} ...", flush=True)
        train_alone(run, (*OVERRIDES, *variant.overrides), timeout_s)
    return Trained(variant, read_metrics(run / "metrics.jsonl"), expert_shares(run))


def expert_shares(run: Path) -> dict[str, list[float]]:
    """Share of the last step's choices that each expert got, by layer; each sums to 1. Read from the final checkpoint."""
    (tensors,) = (run / "checkpoints" / f"step_{STEPS:08d}").glob("rank_*.safetensors")
    shares = {}
    for name, buffer in sorted(load_file(tensors).items()):
        if match := LOAD_SHARE.search(name):
            shares[match[1]] = (buffer / len(buffer)).tolist()
    return shares


def table(summaries: list[dict[str, Any]]) -> list[str]:
    """One line per run: violations, held-out losses, seconds of training."""
    lines = [
        f"{'':<19}  {f'violation, last {LAST} steps':^24}  {'least in':>11}  {'held-out loss':^14}",
        f"{'':<19}  {'mean':>6}  {'min':>6}  {'max':>6}    {'second half':>11}  {'main':>6}  {'mtp 1':>6}  {'s':>4}",
    ]
    for run in summaries:
        last = run[f"violation_last_{LAST}"]
        lines.append(
            f"{run['variant']:<19}  {last['mean']:6.3f}  {last['min']:6.3f}  {last['max']:6.3f}    "
            f"{run['violation_second_half_min']:11.3f}  {run['eval_loss_main']:6.4f}  {run['eval_loss_mtp_1']:6.4f}  "
            f"{run['seconds']:>4}"
        )
    return lines


def draw(trained: list[Trained], path: Path) -> None:
    """Violations by step, beside the experts' shares in the last step and the losses."""
    figure = Figure(figsize=(13, 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        "Auxiliary-loss-free balancing: 16 routed experts, 4 per token, bytes of Shakespeare", fontsize=13, color=INK
    )
    left, middle, right = figure.subfigures(1, 3, squeeze=False, width_ratios=(1.5, 1, 1), wspace=0.04)[0]
    draw_violations(left.subplots(), trained)
    draw_shares(middle, trained)
    draw_losses(right.subplots(), trained)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def draw_violations(axes: Axes, trained: list[Trained]) -> None:
    """Every step faint, the mean over 50 steps strong."""
    prepare(axes, "Largest expert load / mean load - 1, worst layer")
    for run in trained:
        steps = np.arange(1, len(run.rows) + 1)
        axes.plot(steps, run.violations, color=run.variant.colour, alpha=0.25, linewidth=0.7)
        axes.plot(
            smooth(steps), smooth(run.violations), color=run.variant.colour, linewidth=2.2, label=run.variant.label
        )
    for level in (BALANCED, UNBALANCED):
        axes.axhline(level, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set(yscale="log", xlim=(0, STEPS), ylim=(0.05, 4), xlabel="optimizer step")
    axes.set_yticks([0.1, BALANCED, UNBALANCED, 3], ["0.1", "0.3", "1.0", "3.0"])
    axes.minorticks_off()
    axes.legend(loc="lower left", frameon=False, fontsize=10, labelcolor=INK)


def draw_shares(figure: SubFigure, trained: list[Trained]) -> None:
    """The layer that is least balanced without the bias, experts from the busiest to the idlest, one panel per run."""
    frozen = trained[0].shares
    layer = max(frozen, key=lambda name: max(frozen[name]))
    place = f"layer {layer}" if int(layer) < TRUNK_LAYERS else "MTP module"
    panels = figure.subplots(len(trained), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, run in zip(panels, trained, strict=True):
        prepare(axes, f"Choices per expert, {place}, last step" if axes is panels[0] else "")
        shares = np.sort(run.shares[layer])[::-1] * 100
        axes.bar(np.arange(1, len(shares) + 1), shares, color=run.variant.colour, width=0.78)
        axes.axhline(100 / len(shares), color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.text(
            0.97, 0.9, run.variant.label, transform=axes.transAxes, ha="right", va="top", color=run.variant.colour
        )
        axes.set_ylabel("%", fontsize=9, color=FAINT)
        axes.grid(visible=False, axis="x")
    panels[-1].set_xticks([])
    panels[-1].set_xlabel("experts, busiest first (dashed: the mean)")


def draw_losses(axes: Axes, trained: list[Trained]) -> None:
    """Main loss of training, smoothed, and on held-out text."""
    prepare(axes, "Main loss, nats per byte")
    for size, run in zip(np.linspace(8, 4, len(trained)), trained, strict=True):  # coinciding points stay visible
        colour = run.variant.colour
        axes.plot(
            smooth([row["step"] for row in run.rows]),
            smooth([row["loss_main"] for row in run.rows]),
            color=colour,
            linewidth=1.4,
        )
        held_out = [row for row in run.rows if "eval_loss_main" in row]
        final = held_out[-1]["eval_loss_main"]
        axes.plot(
            [row["step"] for row in held_out],
            [row["eval_loss_main"] for row in held_out],
            color=colour,
            linestyle="none",
            marker="o",
            markersize=size,
            markerfacecolor="white",
            label=f"{run.variant.label}: {final:.3f}",
        )
    axes.set(xlim=(0, STEPS * 1.02), ylim=(1.4, 2.6), xlabel="optimizer step")
    axes.legend(
        loc="upper right",
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        title="circles: held out, with the last value\nlines: training",
        title_fontsize=9,
        alignment="left",
    )


def smooth(values: Any, window: int = 50) -> np.ndarray:
    """Means over each ``window`` neighbouring steps: [S] -> [S - window + 1]."""
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


if __name__ == "__main__":
    sys.exit(main())
