"""``dist-mtp plan``: show how a run would be cut into stages and scheduled, without starting it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path

from dist_mtp.cli import measure
from dist_mtp.cli.compose import compose
from dist_mtp.cli.gpus import cuda_device_name, visible_gpus
from dist_mtp.config import Config, resolve
from dist_mtp.data.tokenizers import tokenizer_vocab_size
from dist_mtp.launch.cluster import plan_cluster, settled
from dist_mtp.monitor.atomic import replace_text
from dist_mtp.monitor.formatting import compact, percent, span
from dist_mtp.monitor.plan_files import PICTURE, PLAN, write_plan
from dist_mtp.pipeline.comparison import Alternative, compare
from dist_mtp.pipeline.experts import ExpertPlan
from dist_mtp.pipeline.nodes import Node
from dist_mtp.pipeline.plan import Plan, make_plan
from dist_mtp.run_folder import CONFIG_FILE

COMPARISON = "comparison.json"
"""Beside ``plan.json``: what the run would be under every other placement and schedule."""


def main(arguments: list[str]) -> int:
    """``dist-mtp plan [measure=true] [overrides]``."""
    measuring, overrides = measure.take_measure(arguments)
    config, world_size = _on_cluster(compose(overrides))
    resolved = resolve(config, vocab_size=tokenizer_vocab_size(config.tokenizer), world_size=world_size)
    return run(measure.run(resolved) if measuring else resolved)


def run(config: Config) -> int:
    """Print the plan and write ``plan.json`` and ``plan.png`` into the run folder; returns exit code 0.

    The folder of a run keeps its own plan: that one was made on the machine, and with the settings, that trained.

    Args:
        config: resolved; ``pipeline.device_profile=auto`` plans for the device that ranks started here would use.

    Raises:
        ConfigError: the configuration has no plan.
    """
    plan = make_plan(config, cuda_device_name(config))
    folder = Path(config.run_dir)
    alternatives = compare(config, plan)
    print(summary(plan, alternatives))
    if (folder / CONFIG_FILE).exists():
        print(f"\nnot written: {folder} holds a run and its {PLAN}; choose another run.name to write this plan")
        return 0
    write_plan(plan, folder)
    replace_text(folder / COMPARISON, json.dumps([other.to_json() for other in alternatives], indent=2) + "\n")
    print(f"\nwritten to {folder / PLAN}, {folder / PICTURE} and {folder / COMPARISON}")
    return 0


def _on_cluster(config: Config) -> tuple[Config, int | None]:
    """The configuration with the nodes that a launcher of several would start, and their ranks; None if they are free."""
    launcher = config.launcher
    if launcher.nodes == 1 and not launcher.hosts and launcher.hostfile is None:
        return config, None
    cluster = plan_cluster(config, gpus=len(visible_gpus()))
    return settled(config, cluster.nodes), cluster.world_size


def summary(plan: Plan, alternatives: Sequence[Alternative] = ()) -> str:
    """The plan as aligned tables of stages and ranks, where experts and ranks live, and the numbers to judge it by."""
    parts = [_stage_table(plan), _rank_table(plan)]
    if plan.experts is not None:
        parts.append(_experts(plan.experts))
    parts.append(_nodes(plan))
    if alternatives:
        parts.append(_alternatives(plan, alternatives))
    parts.append(_predictions(plan))
    if plan.warnings:
        parts.append([line for warning in plan.warnings for line in _wrapped(f"warning: {warning}")])
    return "\n\n".join("\n".join(part) for part in parts)


def _stage_table(plan: Plan) -> list[str]:
    total = sum(stage.cost.time for stage in plan.stages)
    rows = [("stage", "rank", "units", "", "time", "params")]
    for stage in plan.stages:
        names = stage.unit_names
        share = percent(stage.cost.time / total)
        rows.append(
            (str(stage.index), str(stage.rank), str(len(names)), span(names), share, compact(stage.cost.params))
        )
    return _aligned(rows, left=(3,))


def _rank_table(plan: Plan) -> list[str]:
    """Share of the step, parameters and bytes of one data-parallel rank of each pipeline rank.

    ``next``: what a step exchanges with ranks further on, both ways.
    """
    header = (
        "rank",
        "busy",
        "dense params",
        "expert params",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "memory",
        "next",
    )
    rows: list[tuple[str, ...]] = [header]
    edges = plan.edge_bytes()
    for rank, busy in zip(plan.ranks, plan.timeline.busy, strict=True):
        params = (compact(count) if count else "-" for count in (rank.dense_params, rank.expert_params))
        kinds = (rank.weight_bytes, rank.gradient_bytes, rank.optimizer_bytes, rank.activation_bytes, rank.total_bytes)
        sent = sum(num_bytes for (lower, _), num_bytes in edges.items() if lower == rank.rank)
        rows.append(
            (
                str(rank.rank),
                percent(busy / plan.timeline.step_time).strip(),
                *params,
                *(f"{compact(size)}B" for size in kinds),
                f"{compact(sent)}B" if sent else "-",
            )
        )
    return _aligned(rows)


def _experts(experts: ExpertPlan) -> list[str]:
    places = [f"{_span(experts.held_by(rank))} on data rank {rank}" for rank in experts.groups[0]]
    groups = [_span(group) for group in experts.groups]
    sent = experts.all_to_all_bytes
    path = "inside nodes" if experts.within_node else "between nodes"
    return [
        f"experts             {experts.num_experts} per MoE layer, {experts.per_rank} per rank: {_shortened(places)}",
        f"expert groups       data ranks {_shortened(groups)} of each pipeline rank; copies of each expert: {experts.copies}",
        f"all-to-all          {compact(min(sent))}B to {compact(max(sent))}B sent per rank and step if experts are "
        f"balanced, {path}",
    ]


def _nodes(plan: Plan) -> list[str]:
    """Who shares a node, and what crosses nodes; one line if all ranks are in one."""
    nodes = plan.nodes.nodes
    if len(nodes) == 1:
        return [f"nodes               1 with {len(nodes[0].ranks)} ranks: nothing crosses"]
    rows = [("node", "ranks", "pipeline ranks", "data ranks"), *map(_node_row, range(len(nodes)), nodes)]
    if len(rows) > 5:
        rows = [*rows[:3], ("..", "..", "..", ".."), rows[-1]]
    lines = [*_aligned(rows), ""]
    names = {
        "pipeline": "pipeline messages",
        "embedding": "embedding copies",
        "data": "gradient rings",
        "experts": "all-to-all",
    }
    for traffic in plan.traffic:
        share = f"{traffic.crossing_links:,} of {traffic.links:,} links" if traffic.links else "no links"
        sent = f", {compact(traffic.busiest_node_bytes)}B from a node in a step" if traffic.crossing_links else ""
        lines.append(f"{names[traffic.kind]:<18}  {traffic.crossing} cross nodes ({share}{sent})")
    for warning in plan.node_warnings:
        lines += _wrapped(f"warning: {warning}")
    return lines


def _node_row(index: int, node: Node) -> tuple[str, str, str, str]:
    data_ranks = [_span(ranks) for ranks in node.data_ranks]
    if len(set(data_ranks)) == 1:
        data_ranks = data_ranks[:1]
    return str(index), _span(node.ranks), _span(node.pipeline_ranks), _shortened(data_ranks)


def _span(numbers: range) -> str:
    """First and last: ``4-7``."""
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def _shortened(items: Sequence[str]) -> str:
    """All of a few items, else the first two and the last."""
    return ", ".join(items if len(items) <= 4 else [*items[:2], "..", items[-1]])


def _alternatives(plan: Plan, alternatives: Sequence[Alternative]) -> list[str]:
    """Every placement and schedule, the plan's own marked."""
    rows: list[tuple[str, ...]] = [("", "placement", "schedule", "step", "bubble", "activations", "memory", "")]
    for other in alternatives:
        mark = "*" if (other.placement, other.schedule) == (plan.placement, plan.schedule) else ""
        if other.step_time is None or other.bubble is None:
            rows.append((mark, other.placement, other.schedule, "-", "-", "-", "-", ""))
            continue
        sizes = (f"{compact(size or 0)}B" for size in (other.peak_activation_bytes, other.memory_bytes))
        too_much = plan.memory_limit is not None and (other.memory_bytes or 0) > plan.memory_limit
        verdict = "too much" if too_much else ""
        rows.append(
            (mark, other.placement, other.schedule, f"{other.step_time:.4g} s", percent(other.bubble), *sizes, verdict)
        )
    problems = dict.fromkeys(other.problem for other in alternatives if other.problem)
    return [*_aligned(rows, left=(0, 1, 2, 7)), *(line for problem in problems for line in _wrapped(f"-: {problem}"))]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=120, subsequent_indent=" " * (text.index(":") + 2))


def _aligned(rows: Sequence[tuple[str, ...]], left: Collection[int] = ()) -> list[str]:
    """Rows as lines of equal columns, all but those in ``left`` right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in enumerate(cells)
        )
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]


def _origin(plan: Plan) -> str:
    """How ``planned`` made its table."""
    if plan.origin == plan.schedule:
        return ""
    if plan.origin == "list":
        return " (list scheduling)"
    moved = plan.origin.endswith("+")
    return f" ({plan.origin.rstrip('+')}{', weight gradients placed anew' if moved else ''})"


def _predictions(plan: Plan) -> list[str]:
    timeline, bound = plan.timeline, plan.bound
    rank_times = [sum(stage.cost.time for stage in plan.stages_of(rank)) for rank in range(plan.pp)]
    balance = sum(rank_times) / plan.pp / max(rank_times)
    peaks = timeline.peak_activation_bytes
    return [
        f"{plan.schedule}{_origin(plan)} on {plan.placement} placement: pp={plan.pp}, dp={plan.dp}, "
        f"{plan.micro_batches} microbatches, device profile {plan.profile.name}",
        f"recomputed          {'nothing' if str(plan.recompute) == 'none' else plan.recompute}",
        f"predicted step      {timeline.step_time:.4g} s, bubble{percent(timeline.bubble)}",
        f"peak activations    {compact(min(peaks))}B to {compact(max(peaks))}B per rank",
        f"balance of ranks   {percent(balance)}, at most {percent(bound.balance).strip()} with the head on one rank",
        f"ramp               {percent(bound.ramp)} is the most that filling and draining the pipeline leave",
        f"least bubble       {percent(1 - balance * bound.ramp)} with these stages under any order of actions",
    ]
