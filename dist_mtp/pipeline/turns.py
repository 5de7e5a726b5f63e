"""More than two stages per rank, round the ranks: a good partition in bounded time.

All but two neighbouring sweeps over the ranks are held still, those two are searched exactly, and so on in turns until no two can
do better. That is no proof that nothing is better: DeepSeek-V3 on 16 ranks with four stages each comes within 3 % of the best
partition known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import numpy as np

from dist_mtp.pipeline.balance import Balance, Counts, uniform_counts
from dist_mtp.pipeline.exact import search_sweeps
from dist_mtp.pipeline.sweeps import (
    Moves,
    Sweeps,
    evenest_of,
    least_cap,
    least_pace,
    rank_times,
    trace_of,
    unevenness,
)

_ROUNDS = 8
"""Most turns of the search over pairs of sweeps; two or three are usual."""
_WINDOW = 6
"""Units by which a turn moves the split point between its two sweeps at most."""
_TOLERANCE = 1e-7
"""Relative, of the pace that a turn improves: less is not worth a turn."""


def search_in_turns(problem: Balance, slacks: Sequence[float]) -> list[Counts]:
    """Search two neighbouring sweeps at a time, from two starts."""
    counts = min((_fast(problem, start) for start in _starts(problem)), key=partial(_slowness, problem))
    empty_ranks, excess, pace = _slowness(problem, counts)
    if excess > 0:
        raise problem.too_large(counts)
    if empty_ranks > 0:
        raise problem.too_many_ranks()

    results: dict[float, Counts] = {}
    for slack in sorted(set(slacks)):

        def evener(pair: list[Sweeps], now: Moves, limit: float = pace * (1 + slack)) -> Moves | None:
            below = unevenness(_present(pair, now), now)
            return _moves(evenest_of(pair, limit, problem.cap, below=below))

        counts = _take_turns(problem, counts, evener, partial(_unevenness, problem))
        results[slack] = counts
    return [results[slack] for slack in slacks]


def _moves(found: tuple[float, Moves] | None) -> Moves | None:
    return None if found is None else found[1]


def _starts(problem: Balance) -> list[Counts]:
    """Even stages, and stages that leave the last rank little beside a heavy last unit."""
    num_stages, count, whole = len(problem.stage_to_rank), problem.num_ranks, float(problem.times[-1])
    if problem.num_units >= num_stages:
        even = search_sweeps(Balance(problem.costs, tuple(range(num_stages)), None), (0.0,))
    else:
        even = [uniform_counts(problem.num_units, num_stages)]
    if count == 1:
        return even
    head = problem.costs[-1].time
    last_rank = max(whole / count, head)
    shares = np.full((problem.num_sweeps, count), (whole - last_rank) / (count - 1) / problem.num_sweeps)
    shares[:, -1] = (last_rank - head) / (problem.num_sweeps - 1)
    shares[-1, -1] = head
    wanted = np.cumsum(shares.ravel())[:-1]
    cuts = np.abs(problem.times[1:-1] - wanted[:, None]).argmin(axis=1) + 1
    return [*even, tuple(np.diff([0, *cuts, problem.num_units]).tolist())]


def _fast(problem: Balance, counts: Counts) -> Counts:
    def smaller(pair: list[Sweeps], now: Moves) -> Moves:
        cap, sweeps = least_cap(pair)
        return trace_of(sweeps, math.inf, cap)

    def faster(pair: list[Sweeps], now: Moves) -> Moves | None:
        present = float(rank_times(_present(pair, now), now).max())
        fastest = least_pace(pair, problem.cap, math.inf if _empty_ranks(problem, counts) else present, _TOLERANCE)
        return None if fastest is None else _moves(evenest_of(pair, fastest[0], problem.cap))

    if _slowness(problem, counts)[1] > 0:
        counts = _take_turns(problem, counts, smaller, lambda counts: (max(problem.loads(counts)[1]),))
    return _take_turns(problem, counts, faster, partial(_slowness, problem))


def _slowness(problem: Balance, counts: Counts) -> tuple[float, float, float]:
    """Ranks without units, bytes of a rank that exceeds the cap, and the slowest rank's time."""
    times, memory = problem.loads(counts)
    return _empty_ranks(problem, counts), (0.0 if problem.fits(counts) else max(memory)), max(times)


def _empty_ranks(problem: Balance, counts: Counts) -> int:
    return sum(not any(counts[rank :: problem.num_ranks]) for rank in range(problem.num_ranks))


def _unevenness(problem: Balance, counts: Counts) -> tuple[float, float]:
    """Empty stages, and the sum of squared stage and rank times."""
    stages = np.diff(problem.times[list(accumulate(counts, initial=0))])
    return counts.count(0), float((stages**2).sum() + (np.array(problem.loads(counts)[0]) ** 2).sum())


def _present(pair: list[Sweeps], now: Moves) -> Sweeps:
    """The alternative that ``now`` is one way of."""
    length = sum(first for first, _ in now)
    return next(sweeps for sweeps in pair if sweeps.lengths[0] == length)


def _take_turns(
    problem: Balance,
    counts: Counts,
    search: Callable[[list[Sweeps], Moves], Moves | None],
    cost: Callable[[Counts], tuple[float, ...]],
) -> Counts:
    """Search pair after pair of neighbouring sweeps, as long as that lowers the cost."""
    num_ranks, least = problem.num_ranks, cost(counts)
    for _ in range(_ROUNDS):
        before = least
        for sweep in range(problem.num_sweeps - 1):
            start, middle, stop = (num_ranks * (sweep + i) for i in range(3))
            pair = problem.pair(sweep, list(accumulate(counts, initial=0)), _WINDOW)
            moves = search(pair, list(zip(counts[start:middle], counts[middle:stop], strict=True)))
            if moves is None:
                continue
            firsts, seconds = zip(*moves, strict=True)
            changed = (*counts[:start], *firsts, *seconds, *counts[stop:])
            if cost(changed) < least:
                counts, least = changed, cost(changed)
        if least == before:
            break
    return counts
