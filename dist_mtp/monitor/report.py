"""The few lines that end a run: what was learnt, how fast, and where everything lies."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_mtp.monitor.depths import by_depth, expected_tokens_per_step
from dist_mtp.monitor.formatting import compact


def final_report(
    first: Mapping[str, float],
    last: Mapping[str, float],
    eval_metrics: Mapping[str, float],
    corpus_info: Mapping[str, Any],
    run_dir: str | Path,
    *,
    median_tokens_per_s: float,
    last_checkpoint: str | Path | None,
    expert_loads: Mapping[int, Sequence[float]],
) -> list[str]:
    """Lines for people.

    Args:
        first: row of the first step; its losses are those of the untrained model.
        last: row of the last step.
        eval_metrics: ``eval_*`` keys of the last evaluation, or an empty mapping.
        corpus_info: of ``dist_mtp.data.corpus``: ``unigram_entropy_nats`` and, for held-out text,
            ``validation_unigram_cross_entropy_nats``, the nats/token that a model of mere token frequencies reaches.
            Without them no comparison is printed.
        median_tokens_per_s: see :func:`median_tokens_per_s`.
        expert_loads: tokens of each expert in the last step, by layer; empty for a model without experts.
    """
    return [
        f"trained {last['step']:,} steps, {last['tokens']:,} tokens, "
        f"{compact(median_tokens_per_s)} tokens/s (median over steps)",
        "",
        *_loss_table(first, last, eval_metrics, corpus_info),
        "",
        *_agreement(last, eval_metrics),
        *_experts(last, expert_loads),
        *_places(Path(run_dir), last_checkpoint),
    ]


def median_tokens_per_s(rows: Iterable[Mapping[str, float]]) -> float:
    """Typical speed: the median ignores the first step's warm-up and steps that waited for a checkpoint.

    Raises:
        statistics.StatisticsError: there are no rows.
    """
    return statistics.median(row["tokens_per_s"] for row in rows)


def parameter_table(rows: Sequence[tuple[str, int]]) -> list[str]:
    """Part, parameters and share of the total, one line per part, and the total.

    >>> print("\\n".join(parameter_table([("trunk", 3_000), ("MTP", 1_000)])))
    part   parameters   share
    trunk       3,000   75.0%
    MTP         1,000   25.0%
    total       4,000  100.0%
    """
    total = sum(count for _, count in rows)
    width = max(len(part) for part, _ in [*rows, ("total", 0)])
    lines = [f"{'part':<{width}}  {'parameters':>10}  {'share':>6}"]
    for part, count in [*rows, ("total", total)]:
        lines.append(f"{part:<{width}}  {count:>10,}  {count / max(total, 1):>6.1%}")
    return lines


def _loss_table(
    first: Mapping[str, float],
    last: Mapping[str, float],
    eval_metrics: Mapping[str, float],
    corpus_info: Mapping[str, Any],
) -> list[str]:
    # Held-out losses are compared where there are any: a memorised training text beats every unigram model.
    held_out_known = "eval_loss_main" in eval_metrics
    text, entropy_key = ("training text", "unigram_entropy_nats")
    if held_out_known and "validation_unigram_cross_entropy_nats" in corpus_info:
        text, entropy_key = ("held-out text", "validation_unigram_cross_entropy_nats")
    unigram = corpus_info.get(entropy_key)

    lines = [f"{'loss (nats/token)':<17}  {'first':>8}  {'last':>8}  {'held out':>8}"]
    if unigram is not None:
        lines[0] += f"  against unigrams, {unigram:.4f} on {text}"
    depths = range(1, len(by_depth(last, "loss_mtp_")) + 1)
    for name, key in [("main", "loss_main"), *((f"mtp {k}", f"loss_mtp_{k}") for k in depths)]:
        held_out = eval_metrics.get(f"eval_{key}")
        line = f"{name:<17}  {first[key]:8.4f}  {last[key]:8.4f}  "
        line += f"{'-':>8}" if held_out is None else f"{held_out:8.4f}"
        if unigram is not None:
            gain = unigram - (last[key] if held_out is None else held_out)
            line += f"  {abs(gain):.4f} {'better' if gain > 0 else 'worse'}"
        lines.append(line)
    return lines


def _agreement(last: Mapping[str, float], eval_metrics: Mapping[str, float]) -> list[str]:
    rates = by_depth(eval_metrics, "eval_accept_mtp_") or by_depth(last, "accept_mtp_")
    if not rates:
        return []
    lines = [
        f"mtp {k} agrees with the main head's argmax at {rate:.1%} of positions" for k, rate in enumerate(rates, 1)
    ]
    return [*lines, f"expected tokens per decoding step: {expected_tokens_per_step(rates):.2f}", ""]


def _experts(last: Mapping[str, float], expert_loads: Mapping[int, Sequence[float]]) -> list[str]:
    if not expert_loads:
        return []
    share = {
        (layer, expert): load / statistics.fmean(loads)
        for layer, loads in expert_loads.items()
        for expert, load in enumerate(loads)
    }
    most, least = max(share, key=share.__getitem__), min(share, key=share.__getitem__)
    layers = "1 layer" if len(expert_loads) == 1 else f"{len(expert_loads)} layers"
    return [
        f"experts          max violation {share[most] - 1:.2f} over {layers} "
        f"(layer {most[0]}, expert {most[1]}), least load {share[least]:.2f} of the mean "
        f"(layer {least[0]}, expert {least[1]}), router bias norm {last['router_bias_norm']:.3g}",
        "",
    ]


def _places(run_dir: Path, last_checkpoint: str | Path | None) -> list[str]:
    return [
        f"TensorBoard      tensorboard --logdir {run_dir / 'tensorboard'}",
        f"plan             {run_dir / 'plan.png'}",
        f"metrics          {run_dir / 'metrics.jsonl'}",
        f"last checkpoint  {'none' if last_checkpoint is None else last_checkpoint}",
    ]
