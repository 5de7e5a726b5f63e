"""Bounds: what no partition or schedule can get around, so that a plan can be judged by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.pipeline.table import Kind, Table


@dataclass(frozen=True)
class Bound:
    """Limits of a plan's efficiency: ``1 - bubble <= balance * ramp``."""

    balance: float
    """See :func:`balance_bound`."""
    ramp: float
    """See :func:`ramp_bound`."""


def balance_bound(costs: Sequence[UnitCost], num_ranks: int, placement: str) -> float:
    """Mean rank time / slowest rank's time, if everything but the head unit could be cut at will.

    The rank with the head (final norm, D + 1 heads and D MTP modules; under ``v`` also the embedding, which is on the
    same rank by construction) cannot be given less than that, however many ranks there are: from some P on, further
    ranks only wait for it.

    Args:
        costs: one per unit, embedding first, head last.
    """
    mean = sum(cost.time for cost in costs) / num_ranks
    return mean / max(mean, _indivisible(costs, placement))


def balanced_ranks(costs: Sequence[UnitCost], placement: str) -> int:
    """The largest P at which the head's rank need not be slower than the mean."""
    return max(1, int(sum(cost.time for cost in costs) / _indivisible(costs, placement)))


def ramp_bound(
    table: Table, stage_costs: Sequence[UnitCost], stage_to_rank: Sequence[int], message_seconds: float = 0.0
) -> float:
    """Efficiency that is left if only the two ends of a step cost time.

    Rank r cannot start before the first microbatch has come through all stages before the rank's first one, and when
    that stage is done with its last input gradient, the gradient still has to travel back to stage 0. A step therefore
    lasts at least ``start(r) + busy(r) + tail(r)`` for every r, and the ramp is the largest busy / the largest such sum.

    Where the schedule splits backwards, only I is on the way back, and all that a rank may have left to do meanwhile are
    Ws: ``tail(r) = max(0, way back - all Ws of r)``. For equal stages and F = I = W this gives 1F1B's M / (M + P - 1)
    (arXiv 2104.04473, section 2.2.1) and 6M / (6M + P - 1) for ``zbv``.
    """
    splits = any(action.kind is Kind.W for actions in table for action in actions)
    longest_busy = shortest_step = 0.0
    for rank, actions in enumerate(table):
        count = {kind: [0] * len(stage_costs) for kind in (Kind.F, Kind.I, Kind.W, Kind.B)}
        for action in actions:
            count[action.kind][action.stage] += 1
        put_off = sum(times * cost.time_w for times, cost in zip(count[Kind.W], stage_costs, strict=True))
        busy = put_off + sum(
            forwards * cost.time_f + inputs * cost.time_i + fulls * (cost.time_i + cost.time_w)
            for forwards, inputs, fulls, cost in zip(
                count[Kind.F], count[Kind.I], count[Kind.B], stage_costs, strict=True
            )
        )
        first = stage_to_rank.index(rank)
        before = stage_costs[:first]
        hops = sum(stage_to_rank[stage] != stage_to_rank[stage + 1] for stage in range(first))
        start = hops * message_seconds + sum(cost.time_f for cost in before)
        way_back = hops * message_seconds + sum(cost.time_i + (0.0 if splits else cost.time_w) for cost in before)
        longest_busy = max(longest_busy, busy)
        shortest_step = max(shortest_step, start + busy + max(0.0, way_back - put_off))
    return longest_busy / shortest_step


def _indivisible(costs: Sequence[UnitCost], placement: str) -> float:
    """Seconds per microbatch that the rank with the head has in any case."""
    return costs[-1].time + (costs[0].time if placement == "v" else 0.0)
