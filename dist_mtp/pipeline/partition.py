"""Partition: which run of units each stage holds, so that no rank has much more to do than the others.

In the steady state of a pipeline every rank runs all of its stages once per microbatch, so the rank with the largest
total sets the pace. The search first finds the smallest possible pace, then, among the partitions that keep it, one whose
other ranks and stages are as even as possible: least sum of squares.

Even stages matter too: a rank with a long and a short stage makes its neighbours wait, though its total is right. A
little slack in the pace often buys much evenness (DeepSeek-V3, D=1, P=8, M=32, zbv: 2 % slack lowers the bubble from
17 % to 8 %), so ``plan`` compares a few values of it by simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from dist_mtp.errors import ConfigError
from dist_mtp.pipeline.balance import Balance, Counts, uniform_counts
from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.pipeline.exact import are_few, compare_all, search_sweeps
from dist_mtp.pipeline.layout import read_layout
from dist_mtp.pipeline.memory_limit import MemoryLimit
from dist_mtp.pipeline.turns import search_in_turns

Partition = tuple[tuple[int, ...], ...]
"""``partition[stage]`` holds the stage's unit indices, a contiguous run; empty for a stage that only passes on hidden states."""


def partition(
    costs: Sequence[UnitCost],
    stage_to_rank: Sequence[int],
    layout: str = "auto",
    slack: float = 0.0,
    *,
    limit: MemoryLimit | None = None,
) -> Partition:
    """Cut the units into one contiguous run per stage.

    The first stage always holds the embedding, the last one the head. Others may be empty, as long as each rank holds a unit.

    Args:
        costs: one per unit, in order.
        stage_to_rank: rank of each stage.
        layout: ``auto`` balances the times: the slowest rank's is the least possible, but for more than two stages per rank
            a good one, unless units are few (see :mod:`~dist_mtp.pipeline.turns`). A stage stays empty only where the slowest
            rank would else be slower, or units are too few. ``uniform`` gives each stage as many units, earlier ones the
            remainder. Anything else is read by :func:`~dist_mtp.pipeline.layout.read_layout`.
        slack: how much slower than the least possible the slowest rank may become under ``auto`` to make the others and the
            stages more even; 0.02 is 2 %.
        limit: of each rank's memory, for ``auto``; what is fastest among the partitions that fit is found.

    Raises:
        ConfigError: too few units, a layout that does not fit the model, or a model that does not fit the limit.
    """
    return partition_candidates(costs, stage_to_rank, layout, (slack,), limit=limit)[0]


def partition_candidates(
    costs: Sequence[UnitCost],
    stage_to_rank: Sequence[int],
    layout: str,
    slacks: Sequence[float],
    limit: MemoryLimit | None = None,
) -> list[Partition]:
    """As :func:`partition`, for several slacks at once: different partitions only, in the order of the slacks."""
    _check_units(len(costs), stage_to_rank)
    if layout == "auto":
        candidates = _balanced(Balance(costs, tuple(stage_to_rank), limit), slacks)
    elif layout == "uniform":
        candidates = [uniform_counts(len(costs), len(stage_to_rank))]
    else:
        candidates = [read_layout(layout, stage_to_rank, len(costs))[0]]
    return [contiguous(counts) for counts in dict.fromkeys(candidates)]


def contiguous(counts: Sequence[int]) -> Partition:
    """The partition with so many units on each stage."""
    return tuple(tuple(range(start, stop)) for start, stop in pairwise(accumulate(counts, initial=0)))


def _balanced(problem: Balance, slacks: Sequence[float]) -> list[Counts]:
    if problem.limit is not None:
        # Most often what is best without a limit fits, and is found much sooner.
        unlimited = _balanced(replace(problem, limit=None), slacks)
        if all(problem.fits(counts) for counts in unlimited):
            return unlimited
    if problem.is_v or problem.num_sweeps <= 2:
        return search_sweeps(problem, slacks)
    return compare_all(problem, slacks) if are_few(problem) else search_in_turns(problem, slacks)


def least_units(stage_to_rank: Sequence[int]) -> int:
    """Units that a model needs: one per rank, and two where one rank has both ends of the model."""
    num_ranks = max(stage_to_rank) + 1
    both_ends = len(stage_to_rank) > 1 and stage_to_rank[0] == stage_to_rank[-1]
    return num_ranks + both_ends


def _check_units(num_units: int, stage_to_rank: Sequence[int]) -> None:
    least = least_units(stage_to_rank)
    if num_units < least:
        raise ConfigError(
            f"{max(stage_to_rank) + 1} pipeline ranks need at least {least} pipeline units, the model has {num_units}: lower "
            f"parallel.pp or raise model.num_layers"
        )
