"""``dist-mtp plan``: show how a run would be cut into stages and scheduled, without starting it."""

from __future__ import annotations

from pathlib import Path

from dist_mtp.cli.compose import compose
from dist_mtp.cli.gpus import cuda_device_name
from dist_mtp.config import Config, resolve
from dist_mtp.data.tokenizers import tokenizer_vocab_size
from dist_mtp.monitor.formatting import compact, percent
from dist_mtp.monitor.plan_files import PICTURE, PLAN, write_plan
from dist_mtp.pipeline.plan import Plan, make_plan
from dist_mtp.run_folder import CONFIG_FILE


def main(arguments: list[str]) -> int:
    """``dist-mtp plan [overrides]``."""
    config = compose(arguments)
    return run(resolve(config, vocab_size=tokenizer_vocab_size(config.tokenizer)))


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
    print(summary(plan))
    if (folder / CONFIG_FILE).exists():
        print(f"\nnot written: {folder} holds a run and its {PLAN}; choose another run.name to write this plan")
        return 0
    write_plan(plan, folder)
    print(f"\nwritten to {folder / PLAN} and {folder / PICTURE}")
    return 0


def summary(plan: Plan) -> str:
    """The plan as an aligned table of stages and the numbers to judge it by."""
    total = sum(stage.cost.time for stage in plan.stages)
    rows = [("stage", "rank", "units", "", "time", "params")]
    for stage in plan.stages:
        names = stage.unit_names
        span = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
        share = percent(stage.cost.time / total)
        rows.append((str(stage.index), str(stage.rank), str(len(names)), span, share, compact(stage.cost.params)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join(cell.ljust(width) if column == 3 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]
    return "\n".join([*table, "", *_predictions(plan)])


def _predictions(plan: Plan) -> list[str]:
    timeline, bound = plan.timeline, plan.bound
    rank_times = [sum(stage.cost.time for stage in plan.stages_of(rank)) for rank in range(plan.pp)]
    balance = sum(rank_times) / plan.pp / max(rank_times)
    peaks = timeline.peak_activation_bytes
    lines = [
        f"{plan.schedule} on {plan.placement} placement: pp={plan.pp}, dp={plan.dp}, "
        f"{plan.micro_batches} microbatches, device profile {plan.profile.name}",
        f"predicted step      {timeline.step_time:.4g} s, bubble{percent(timeline.bubble)}",
        f"peak activations    {compact(min(peaks))}B to {compact(max(peaks))}B per rank",
        f"balance of ranks   {percent(balance)}, at most{percent(bound.balance)} with the head on one rank",
        f"ramp               {percent(bound.ramp)} is the most that filling and draining the pipeline leave",
        f"least bubble       {percent(1 - balance * bound.ramp)} with these stages under any order of actions",
    ]
    if plan.pp > plan.balanced_ranks:
        lines.append(
            f"warning: the rank with the head is slower than the mean from parallel.pp={plan.balanced_ranks + 1} on: "
            f"parallel.pp={plan.balanced_ranks} with more data parallelism suits this model better"
        )
    return lines
