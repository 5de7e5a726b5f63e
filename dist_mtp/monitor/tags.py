"""Which TensorBoard tag each metric has. Units are part of a tag's name; ``charts`` says which tags share a chart."""

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
    "pipeline_time": "pipeline/time_s",
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
