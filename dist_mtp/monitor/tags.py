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
    "skipped": "optim/skipped",
    "tokens_per_s": "perf/tokens_per_s",
    "step_time": "perf/step_time_s",
    "tflops_per_device": "perf/tflops_per_device",
    "load_max_violation": "moe/load_max_violation",
    "router_bias_norm": "moe/bias_norm",
    "memory_gib": "memory/peak_gib",
    "eval_loss_main": "eval/loss_main",
    "eval_loss_mtp_{k}": "eval/loss_mtp_{k}",
    "eval_accept_mtp_{k}": "eval/accept_rate_{k}",
    "eval_bits_per_byte": "eval/bits_per_byte",
    "tokens": "progress/tokens",
}
"""Metric -> tag of the same value, for every depth ``{k}``; metrics that are not listed are not drawn."""


def scalars(row: Mapping[str, float]) -> dict[str, float]:
    """Tag -> value of everything in one step's metrics that TensorBoard shows.

    >>> scalars({"loss_mtp_2": 3.5, "mfu": 0.25})
    {'loss/mtp_2': 3.5, 'perf/mfu_pct': 25.0}
    """
    values: dict[str, float] = {}
    for key, value in row.items():
        # The depth is the number at the end of a key: loss_mtp_2 -> loss_mtp_{k}, k = 2.
        depth = re.search(r"(?<=_mtp_)\d+$", key)
        pattern = key if depth is None else key.removesuffix(depth[0]) + "{k}"
        if pattern in TAGS:
            values[TAGS[pattern].replace("{k}", depth[0] if depth else "")] = value
    if "mfu" in row:
        values["perf/mfu_pct"] = 100 * row["mfu"]
    if "data_wait_s" in row and row.get("step_time"):
        values["perf/data_wait_pct"] = 100 * row["data_wait_s"] / row["step_time"]
    if accept_rates := by_depth(row, "accept_mtp_"):
        values["mtp/expected_tokens_per_step"] = expected_tokens_per_step(accept_rates)
    return values


def chart_layout(num_depths: int) -> dict[str, dict[str, list[object]]]:
    """Layout of the Custom Scalars tab: category -> chart title -> ``["Multiline", tags]``."""

    def multiline(*tags: str) -> list[object]:
        return ["Multiline", list(tags)]

    depths = range(1, num_depths + 1)
    layout = {
        "Loss": {
            "main and MTP": multiline("loss/main", *(f"loss/mtp_{k}" for k in depths)),
            "held out": multiline("eval/loss_main", *(f"eval/loss_mtp_{k}" for k in depths)),
        },
        "Throughput": {
            "tokens/s": multiline("perf/tokens_per_s"),
            "share of time and of peak, %": multiline("perf/mfu_pct", "perf/data_wait_pct"),
        },
        "MoE": {
            "load max violation": multiline("moe/load_max_violation"),
            "router bias norm": multiline("moe/bias_norm"),
        },
    }
    if num_depths:
        layout["MTP"] = {
            "agreement with the main head": multiline(*(f"mtp/accept_rate_{k}" for k in depths)),
            "expected tokens per decoding step": multiline("mtp/expected_tokens_per_step"),
        }
    return layout
