"""Which charts a run has: one table for TensorBoard's Custom Scalars and for the pictures of ``dist-mtp plot``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """One pair of axes."""

    title: str
    """With the unit, and clear without the titles around it."""
    lines: Mapping[str, str]
    """Pattern of tags -> label of their lines. What the pattern captures stands for ``{}`` in the label."""
    needs: str = ""
    """What a run must have besides the needs of the category."""
    bottom: float | None = 0.0
    """Where the axis begins; None: near the least value."""
    log_scale: bool = False
    """Where values spread over decades."""


@dataclass(frozen=True)
class Category:
    """Charts that stand together: a heading in TensorBoard, one picture ``NAME.png``."""

    title: str
    name: str
    charts: tuple[Chart, ...]
    needs: str = ""
    """``mtp``, ``experts``, ``timelines`` or ``fp8``: runs without it have none of these charts."""


def _fp8() -> tuple[Chart, ...]:
    quantities = {
        "values that become 0, %": {"fp8/underflow_pct": "{}"},
        "relative error, %": {"fp8/error_pct": "{}"},
        "values beyond the largest or not finite, %": {"fp8/saturation_pct": "{}"},
        "least and largest scale": {"fp8/scale_min": "{}", "fp8/scale_max": "{}"},
    }
    roles = {"input": "inputs", "weight": "weights", "grad": "gradients"}
    return tuple(
        Chart(f"{title}, {of}", {rf"{tag}/(\w+)_{role}": label for tag, label in tags.items()}, log_scale=True)
        for title, tags in quantities.items()
        for role, of in roles.items()
    )


CATEGORIES: tuple[Category, ...] = (
    Category(
        "Loss",
        "losses",
        (
            Chart("training loss, nats/token", {"loss/main": "main", r"loss/mtp_(\d+)": "mtp {}"}, bottom=None),
            Chart(
                "held-out loss, nats/token", {"eval/loss_main": "main", r"eval/loss_mtp_(\d+)": "mtp {}"}, bottom=None
            ),
        ),
    ),
    Category(
        "MTP",
        "mtp",
        (
            Chart("agreement with main head, training", {r"mtp/accept_rate_(\d+)": "mtp {}"}),
            Chart("agreement with main head, held out", {r"eval/accept_rate_(\d+)": "mtp {}"}),
            Chart("expected tokens per decoding step", {"mtp/expected_tokens_per_step": "all depths"}, bottom=1.0),
        ),
        needs="mtp",
    ),
    Category(
        "MoE",
        "experts",
        (
            Chart(
                "largest load / mean load - 1",
                {"moe/load_max_violation": "worst layer", r"moe/load_violation/layer_(\d+)": "layer {}"},
            ),
            Chart("router bias norm, all layers", {"moe/bias_norm": "all layers"}),
            Chart("dropped tokens, %", {"moe/dropped_pct": "all layers"}),
            Chart("auxiliary losses, unweighted", {r"moe/loss_(\w+)": "{} loss"}, needs="aux_losses"),
            Chart("all-to-all, MiB per step", {"moe/all_to_all_mib": "all ranks"}, needs="ep"),
            Chart("wait for all-to-all, % of the step", {"moe/all_to_all_wait_pct": "slowest rank"}, needs="ep"),
        ),
        needs="experts",
    ),
    Category(
        "Pipeline",
        "pipeline",
        (
            Chart(
                "bubble, measured and planned, %",
                {"pipeline/bubble_pct_measured": "measured", "pipeline/bubble_pct_theory": "plan"},
            ),
            Chart("time spent computing a stage, %", {r"pipeline/stage_(\d+)_busy_pct": "stage {}"}),
            Chart(
                "time and waits of the pipeline, s",
                {"pipeline/time_s": "pipeline", "pipeline/p2p_wait_s": "wait for messages"},
            ),
        ),
        needs="timelines",
    ),
    Category(
        "Throughput",
        "throughput",
        (
            Chart("tokens/s, all ranks", {"perf/tokens_per_s": "all ranks"}),
            Chart("share of peak FLOP/s (MFU), %", {"perf/mfu_pct": "all ranks"}),
            Chart("wait for data, % of the step", {"perf/data_wait_pct": "rank 0"}),
        ),
    ),
    Category(
        "Optimizer",
        "optimizer",
        (
            Chart("learning rate", {"optim/lr": "all groups"}),
            Chart("gradient norm before clipping", {"optim/grad_norm": "all parameters"}),
        ),
    ),
    Category(
        "Memory",
        "memory",
        (Chart("peak memory so far, GiB", {r"memory/rank_(\d+)_gib": "pipeline rank {}"}),),
    ),
    Category("FP8", "fp8", _fp8(), needs="fp8"),
)


def chart_layout(
    *, has_mtp: bool, has_experts: bool, aux_losses: bool, ep: int, fp8: bool, timelines: bool
) -> dict[str, dict[str, list[object]]]:
    """Layout of the Custom Scalars tab: category -> chart title -> ``["Multiline", patterns of tags]``.

    A chart draws every tag that one of its patterns matches as a regular expression, from the tag's start. TensorBoard adds
    up the layouts of all runs it shows: a chart that two runs have in common must be equal in both, or it is there twice.
    """
    run_has = {
        "": True,
        "mtp": has_mtp,
        "experts": has_experts,
        "aux_losses": aux_losses,
        "ep": ep > 1,
        "timelines": timelines,
        "fp8": fp8,
    }
    return {
        category.title: {
            chart.title: ["Multiline", list(chart.lines)] for chart in category.charts if run_has[chart.needs]
        }
        for category in CATEGORIES
        if run_has[category.needs]
    }
