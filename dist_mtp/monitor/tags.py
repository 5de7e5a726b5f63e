"""Which TensorBoard tag each metric has, and which tags share a chart. Units are part of a tag's name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dist_mtp.monitor.depths import by_depth, expected_tokens_per_step

TAGS: dict[str, str] = {
    "loss": "loss/total",
    "loss_main": "loss/main",
    "loss_mtp_{k}": "loss/mtp_{k}",
    "mtp_weight": "loss/mtp_weight",
    "accept_mtp_{k}": "mtp/accept_rate_{k}",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "tokens_per_s": "perf/tokens_per_s",
    "step_time": "perf/step_time_s",
    "tflops_per_device": "perf/tflops_per_device",
    "load_max_violation": "moe/load_max_violation",
    "load_violation_layer_{k}": "moe/load_violation/layer_{k:02d}",
    "router_bias_norm": "moe/bias_norm",
    "loss_seq_aux": "moe/loss_seq_aux",
    "loss_global_aux": "moe/loss_global_aux",
    "loss_z": "moe/loss_z",
    "memory_gib": "memory/peak_gib",
    "memory_rank_{k}_gib": "memory/rank_{k}_gib",
    "p2p_wait_s": "pipeline/p2p_wait_s",
    "eval_loss_main": "eval/loss_main",
    "eval_loss_mtp_{k}": "eval/loss_mtp_{k}",
    "eval_accept_mtp_{k}": "eval/accept_rate_{k}",
    "eval_bits_per_byte": "eval/bits_per_byte",
    "tokens": "progress/tokens",
}
"""Metric -> tag of the same value, for every depth, layer, stage or pipeline rank ``{k}``; metrics that are listed nowhere
are not drawn."""

SCALED_TAGS: dict[str, tuple[str, float]] = {
    "mfu": ("perf/mfu_pct", 100),
    "dropped_share": ("moe/dropped_pct", 100),
    "all_to_all_bytes": ("moe/all_to_all_mib", 2**-20),
    "bubble": ("pipeline/bubble_pct_measured", 100),
    "bubble_plan": ("pipeline/bubble_pct_theory", 100),
    "stage_{k}_busy_share": ("pipeline/stage_{k}_busy_pct", 100),
}
"""Metric -> tag and the factor from the metric's unit to the tag's; ``{k}`` as above."""

STEP_SHARE_TAGS: dict[str, str] = {
    "data_wait_s": "perf/data_wait_pct",
    "all_to_all_wait_s": "moe/all_to_all_wait_pct",
}
"""Metric in seconds -> tag of its share of the step's time in percent."""

FP8_TAGS: dict[str, tuple[str, float]] = {
    "underflow": ("fp8/underflow_pct", 100),
    "saturation": ("fp8/saturation_pct", 100),
    "error": ("fp8/error_pct", 100),
    "scale_min": ("fp8/scale_min", 1),
    "scale_max": ("fp8/scale_max", 1),
}
"""Quantity of ``fp8_QUANTITY_KIND_ROLE`` -> tag before ``/KIND_ROLE``, and the factor to its unit."""
_FP8_KEY = re.compile(rf"fp8_({'|'.join(FP8_TAGS)})_(.*)")
_NUMBERED_KEY = re.compile(r"(.*(?:mtp|layer|stage|rank)_)(\d+)(.*)")

LOAD_SHARE_TAG = "moe/load_share/layer_{k:02d}"
"""Histogram of one layer: each expert's tokens over the mean of the layer's experts."""


def scalars(row: Mapping[str, float]) -> dict[str, float]:
    """Tag -> value of everything in one step's metrics that TensorBoard shows.

    >>> scalars({"loss_mtp_2": 3.5, "load_violation_layer_3": 0.5, "fp8_underflow_experts_grad": 0.25})
    {'loss/mtp_2': 3.5, 'moe/load_violation/layer_03': 0.5, 'fp8/underflow_pct/experts_grad': 25.0}
    """
    values: dict[str, float] = {}
    for key, value in row.items():
        # loss_mtp_2 -> loss_mtp_{k}, k = 2.
        numbered = _NUMBERED_KEY.fullmatch(key)
        pattern, k = (key, 0) if numbered is None else (f"{numbered[1]}{{k}}{numbered[3]}", int(numbered[2]))
        if pattern in TAGS:
            values[TAGS[pattern].format(k=k)] = value
        elif pattern in SCALED_TAGS:
            tag, factor = SCALED_TAGS[pattern]
            values[tag.format(k=k)] = factor * value
        elif fp8 := _FP8_KEY.fullmatch(key):
            tag, factor = FP8_TAGS[fp8[1]]
            values[f"{tag}/{fp8[2]}"] = factor * value
        elif key in STEP_SHARE_TAGS and row.get("step_time"):
            values[STEP_SHARE_TAGS[key]] = 100 * value / row["step_time"]
    if accept_rates := by_depth(row, "accept_mtp_"):
        values["mtp/expected_tokens_per_step"] = expected_tokens_per_step(accept_rates)
    return values


def chart_layout(
    *, has_mtp: bool, has_experts: bool, aux_losses: bool, ep: int, fp8: bool, timelines: bool
) -> dict[str, dict[str, list[object]]]:
    """Layout of the Custom Scalars tab: category -> chart title -> ``["Multiline", tags]``.

    A chart draws every tag that one of its ``tags`` matches as a regular expression, from the tag's start. TensorBoard adds
    up the layouts of all runs it shows: a chart that two runs have in common must be equal in both, or it is there twice.
    """

    def multiline(*tags: str) -> list[object]:
        return ["Multiline", list(tags)]

    layout = {
        "Loss": {
            "main and MTP": multiline("loss/main", r"loss/mtp_\d+"),
            "held out": multiline("eval/loss_main", r"eval/loss_mtp_\d+"),
        }
    }
    if has_mtp:
        layout["MTP"] = {
            "agreement with the main head": multiline(r"mtp/accept_rate_\d+"),
            "expected tokens per decoding step": multiline("mtp/expected_tokens_per_step"),
        }
    if has_experts:
        layout["MoE"] = {
            "largest load over the mean load, minus 1": multiline(
                "moe/load_max_violation", r"moe/load_violation/layer_\d+"
            ),
            "router bias norm": multiline("moe/bias_norm"),
            "dropped tokens, %": multiline("moe/dropped_pct"),
        }
        if aux_losses:
            layout["MoE"]["auxiliary losses, unweighted"] = multiline("moe/loss_.*")
        if ep > 1:
            layout["MoE"]["all-to-all, MiB per step"] = multiline("moe/all_to_all_mib")
            layout["MoE"]["wait for all-to-all, % of the step"] = multiline("moe/all_to_all_wait_pct")
    if timelines:
        layout["Pipeline"] = {
            "bubble, measured and of the plan, %": multiline(
                "pipeline/bubble_pct_measured", "pipeline/bubble_pct_theory"
            ),
            "time in which a stage is computed, %": multiline(r"pipeline/stage_\d+_busy_pct"),
            "wait for messages, s": multiline("pipeline/p2p_wait_s"),
        }
    layout["Throughput"] = {
        "tokens/s": multiline("perf/tokens_per_s"),
        "share of time and of peak, %": multiline("perf/mfu_pct", "perf/data_wait_pct"),
    }
    layout["Memory"] = {"peak so far by pipeline rank, GiB": multiline(r"memory/rank_\d+_gib")}
    if fp8:
        layout["FP8"] = {
            f"{title}, {of}": multiline(rf"{tag}/\w+_{role}")
            for tag, title in (
                ("fp8/underflow_pct", "values that become 0, %"),
                ("fp8/error_pct", "relative error, %"),
                ("fp8/saturation_pct", "values beyond the largest or not finite, %"),
                ("fp8/scale_m(in|ax)", "least and largest scale"),
            )
            for role, of in (("input", "inputs"), ("weight", "weights"), ("grad", "gradients"))
        }
    return layout
