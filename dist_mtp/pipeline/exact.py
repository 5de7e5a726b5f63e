"""Partitions that are fastest of all: for one or two stages per rank, and for any number if units are few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np

from dist_mtp.pipeline.balance import Balance, Counts
from dist_mtp.pipeline.sweeps import Moves, Sweeps, evenest_of, least_cap, least_pace, trace_of, within

_FEW = 20_000
"""So many partitions are simply all compared."""


def search_sweeps(problem: Balance, slacks: Sequence[float]) -> list[Counts]:
    """Units per stage for each slack, with one or two stages per rank.

    Each has the fewest empty stages, and of those the least sum of squared rank and stage times, that there are with a slowest
    rank at most ``slack`` above the least possible.

    Raises:
        ConfigError: nothing fits the limit.
    """
    alternatives = problem.alternatives()
    fastest = least_pace(alternatives, problem.cap)
    if fastest is None:
        cap, sweeps = least_cap(alternatives)
        raise problem.too_large(problem.counts(trace_of(sweeps, math.inf, cap)))
    pace = fastest[0]
    if problem.limit is not None and evenest_of(alternatives, pace, problem.cap) is None:
        pace = _pace_without_empty_ranks(problem, alternatives, pace)
    results: dict[float, Counts] = {}
    best: tuple[float, Moves] | None = None
    for slack in sorted(set(slacks)):
        # What one slack allows, a larger one does: only something better is of interest.
        below = math.inf if best is None else best[0]
        best = evenest_of(alternatives, pace * (1 + slack), problem.cap, below=below) or best
        assert best is not None  # the pace was found to be possible
        results[slack] = problem.counts(best[1])
    return [results[slack] for slack in slacks]


def _pace_without_empty_ranks(problem: Balance, alternatives: Sequence[Sweeps], pace: float) -> float:
    """Where memory would leave a rank without units at ``pace``: the least pace that does not."""
    for factor in (1.1, 1.5, math.inf):
        found = evenest_of(alternatives, pace * factor, problem.cap, minimax=True)
        if found is not None:
            return found[0]
    raise problem.too_many_ranks()


def are_few(problem: Balance) -> bool:
    """Whether :func:`compare_all` takes no longer than a blink."""
    inner = len(problem.stage_to_rank) - 1  # cuts, between the first and the last unit
    return math.comb(problem.num_units - 2 + inner, inner) <= _FEW


def compare_all(problem: Balance, slacks: Sequence[float]) -> list[Counts]:
    """As :func:`search_sweeps`, for stages that go round the ranks any number of times, by comparing every partition."""
    num_stages, count = len(problem.stage_to_rank), problem.num_ranks
    inner = combinations_with_replacement(range(1, problem.num_units), num_stages - 1)
    cuts = np.array([(0, *cut, problem.num_units) for cut in inner])
    cuts = cuts[(np.diff(cuts, axis=1).reshape(len(cuts), -1, count).sum(axis=1) > 0).all(axis=1)]
    stages = np.diff(problem.times[cuts], axis=1)
    ranks = stages.reshape(len(cuts), -1, count).sum(axis=1)
    fullest = np.zeros(len(cuts))
    for rank, combinations in enumerate(problem.memory):
        for sums in combinations:
            held = sum(
                x[cuts[:, s + 1]] - x[cuts[:, s]] for x, s in zip(sums, range(rank, num_stages, count), strict=True)
            )
            fullest = np.maximum(fullest, held + problem.extra(rank))
    fits = fullest <= within(problem.cap)
    if not fits.any():
        raise problem.too_large(tuple(np.diff(cuts[np.argmin(fullest)]).tolist()))
    slowest = ranks.max(axis=1)
    empty = (np.diff(cuts, axis=1) == 0).sum(axis=1)
    squares = (stages**2).sum(axis=1) + (ranks**2).sum(axis=1)
    results = []
    for slack in slacks:
        allowed = np.flatnonzero(fits & (slowest <= within(slowest[fits].min() * (1 + slack))))
        best = allowed[np.lexsort((squares[allowed], empty[allowed]))[0]]
        results.append(tuple(np.diff(cuts[best]).tolist()))
    return results
