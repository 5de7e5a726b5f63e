"""Partition: which run of units each stage holds, so that no rank has much more to do than the others.

In the steady state of a pipeline every rank runs all of its stages once per microbatch, so the rank with the largest
total sets the pace. Both searches below first find the smallest possible pace exactly, then, among the partitions that
keep it, one whose other ranks and stages are as even as possible: least sum of squares.

Even stages matter too: a rank with a long and a short stage makes its neighbours wait, though its total is right. A
little slack in the pace often buys much evenness (DeepSeek-V3, D=1, P=8, M=32, zbv: 2 % slack lowers the bubble from
17 % to 8 %), so ``plan`` compares a few values of it by simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from dist_mtp.errors import ConfigError
from dist_mtp.pipeline.costs import UnitCost

Partition = tuple[tuple[int, ...], ...]
"""``partition[stage]`` holds the stage's unit indices, a contiguous run."""

_Floats = npt.NDArray[np.float64]

_ROUNDING = 1e-9
"""Relative slack of comparisons between sums of times that were added up in different orders."""


def partition(
    costs: Sequence[UnitCost], stage_to_rank: Sequence[int], layout: str = "auto", slack: float = 0.0
) -> Partition:
    """Cut the units into one contiguous, non-empty run per stage.

    Args:
        costs: one per unit, in order.
        stage_to_rank: rank of each stage.
        layout: ``auto`` balances the times. On V placement and with one stage per rank, the slowest rank's time is
            the least possible; with more stages per rank (``interleaved_1f1b``) the slowest stage's is. ``uniform``
            gives each stage as many units, earlier ones the remainder. ``3,2,2,3`` lists the units per stage.
        slack: how much slower than the least possible the slowest rank (or stage) may become under ``auto`` to make
            the others more even; 0.02 is 2 %.

    Raises:
        ConfigError: fewer units than stages, or an explicit layout that does not add up.
    """
    num_stages = len(stage_to_rank)
    if len(costs) < num_stages:
        raise ConfigError(
            f"{num_stages} stages need at least {num_stages} pipeline units, the model has {len(costs)}: lower "
            f"parallel.pp or raise model.num_layers"
        )
    if layout == "uniform":
        share, remainder = divmod(len(costs), num_stages)
        counts = [share + (stage < remainder) for stage in range(num_stages)]
    elif layout != "auto":
        counts = _explicit_counts(layout, num_stages, len(costs))
    elif _is_v(stage_to_rank):
        counts = _balance_v([cost.time for cost in costs], num_stages // 2, slack)
    else:
        counts = _balance_line([cost.time for cost in costs], num_stages, slack)
    return tuple(tuple(range(start, stop)) for start, stop in pairwise(accumulate(counts, initial=0)))


def _explicit_counts(layout: str, num_stages: int, num_units: int) -> list[int]:
    try:
        counts = [int(part) for part in layout.split(",")]
    except ValueError:
        raise ConfigError(
            f"pipeline.layout={layout} is neither auto, uniform nor a list of units per stage such as 3,2,2,3"
        ) from None
    if len(counts) != num_stages:
        raise ConfigError(
            f"pipeline.layout={layout} lists {len(counts)} stages, parallel.pp and pipeline.placement make {num_stages}: "
            f"list {num_stages} numbers that add up to {num_units}"
        )
    if min(counts) < 1:
        raise ConfigError(f"pipeline.layout={layout} has a stage with {min(counts)} units: give each stage at least 1")
    if sum(counts) != num_units:
        raise ConfigError(
            f"pipeline.layout={layout} places {sum(counts)} units, the model has {num_units} (embedding, two per layer, "
            f"and head): change the list so that it adds up to {num_units}"
        )
    return counts


def _is_v(stage_to_rank: Sequence[int]) -> bool:
    ranks = list(range(len(stage_to_rank) // 2))
    return list(stage_to_rank) == ranks + ranks[::-1]


def _balance_line(times: Sequence[float], num_stages: int, slack: float) -> list[int]:
    """Units per stage such that the slowest stage is as fast as possible: the linear partition problem.

    ``best[s][stop]`` is the cost of cutting the first ``stop`` units into s stages. Solved twice: for the least
    maximum, then for the least sum of squares under that maximum.
    """
    num_units = len(times)
    until = list(accumulate(times, initial=0.0))

    def solve(pace: float | None) -> tuple[float, list[int]]:
        inf = float("inf")
        best = [0.0] + [inf] * num_units
        choices: list[list[int]] = []
        for _ in range(num_stages):
            longer, choice = [inf] * (num_units + 1), [0] * (num_units + 1)
            for stop in range(1, num_units + 1):
                for start in range(stop):
                    time = until[stop] - until[start]
                    if pace is None:
                        cost = max(best[start], time)
                    else:
                        cost = best[start] + time * time if time <= pace else inf
                    if cost < longer[stop]:
                        longer[stop], choice[stop] = cost, start
            best = longer
            choices.append(choice)
        cuts = [num_units]
        for choice in reversed(choices):
            cuts.append(choice[cuts[-1]])
        return best[num_units], [stop - start for start, stop in pairwise(reversed(cuts))]

    slowest, _ = solve(None)
    return solve(slowest * (1 + slack + _ROUNDING))[1]


def _balance_v(times: Sequence[float], num_ranks: int, slack: float) -> list[int]:
    """Units per stage of a V such that the slowest rank is as fast as possible.

    A rank of the V takes one run from the front of what is left of the model and one run from its end, so the search
    peels ranks off from the outside. What is left is units ``[front, back)``, its time ``left[front, back]``.
    """
    until = np.concatenate([[0.0], np.cumsum(times)])
    left: _Floats = until[None, :] - until[:, None]
    pace = _slowest_rank_v(left, num_ranks)
    return _even_out_v(left, num_ranks, pace * (1 + slack + _ROUNDING))


def _slowest_rank_v(left: _Floats, num_ranks: int) -> float:
    """The least possible time of the slowest rank, by bisection.

    Whether a pace can be kept follows rank by rank: a rank can leave ``[front', back')`` if some ``[front, back)`` with
    front < front' and back > back' was reachable and ``left[front, back] - left[front', back'] <= pace``. Only the
    smallest such ``left[front, back]`` matters, a minimum over a quadrant, so a rank costs O(units^2).
    """
    num_units = left.shape[0] - 1

    def feasible(pace: float) -> bool:
        remaining = np.full_like(left, np.inf)
        remaining[0, num_units] = left[0, num_units]
        for _ in range(num_ranks):
            smallest = np.minimum.accumulate(remaining, axis=0)
            smallest = np.minimum.accumulate(smallest[:, ::-1], axis=1)[:, ::-1]
            outer = np.full_like(left, np.inf)
            outer[1:, :-1] = smallest[:-1, 1:]
            remaining = np.where(outer - left <= pace, left, np.inf)
            remaining[np.tril_indices_from(remaining, k=-1)] = np.inf  # front > back
        return bool(np.isfinite(np.diagonal(remaining)).any())

    low, high = 0.0, float(left[0, num_units])
    while high - low > _ROUNDING / 10 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if feasible(middle) else (middle, high)
    return high


def _even_out_v(left: _Floats, num_ranks: int, pace: float) -> list[int]:
    """Units per stage with the least sum of squared rank and stage times, all ranks keeping ``pace``.

    ``best[front, back]`` is the cost of the ranks so far if they leave ``[front, back)``. A rank that takes ``down``
    units from the front and ``up`` from the end shifts that matrix, so each (down, up) is one array operation.
    """
    num_units = left.shape[0] - 1
    best = np.full_like(left, np.inf)
    best[0, num_units] = 0.0
    choices: list[npt.NDArray[np.int64]] = []
    for rank in range(num_ranks):
        inner = np.full_like(left, np.inf)
        choice = np.zeros((*left.shape, 2), dtype=np.int64)
        most = num_units - 2 * (num_ranks - 1)  # leaves a unit for each stage of the other ranks
        for down in range(1, most):
            down_time = left.diagonal(down)[: num_units + 1 - down]
            if down_time.min() > pace:
                break
            for up in range(1, most - down + 1):
                up_time = left.diagonal(up)
                if down_time.min() + up_time.min() > pace:
                    break
                # Rows: front of the remaining units before this rank; columns: their end.
                rank_time = down_time[:, None] + up_time[None, :]
                spread = rank_time**2 + down_time[:, None] ** 2 + up_time[None, :] ** 2
                cost = np.where(rank_time <= pace, best[:-down, up:] + spread, np.inf)
                target = inner[down:, :-up]
                better = cost < target
                target[better] = cost[better]
                choice[down:, :-up][better] = (down, up)
        if rank == num_ranks - 1:
            inner[~np.eye(num_units + 1, dtype=bool)] = np.inf  # the tip of the V leaves nothing
        else:
            inner[np.tril_indices_from(inner)] = np.inf
        best = inner
        choices.append(choice)

    front = back = int(np.argmin(np.diagonal(best)))
    downs: list[int] = []
    ups: list[int] = []
    for choice in reversed(choices):
        down, up = (int(count) for count in choice[front, back])
        downs.append(down)
        ups.append(up)
        front, back = front - down, back + up
    return downs[::-1] + ups
