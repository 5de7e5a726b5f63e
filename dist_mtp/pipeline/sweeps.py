"""Search over two sweeps: every rank takes a run of units from each of two sequences, in order.

All placements are made of this. Under V placement the first sequence is the model from its front, the second the model from
its end, and they meet somewhere. Of two stages per rank that go round the ranks, the first sequence is the units before some
split point and the second those from there on. With one stage per rank the second sequence is empty.

A state of the search is ``(front, back)``: how many units of either sequence the ranks so far have taken. Two facts make the
search quick. If a state can be reached at some pace, every smaller one can, as each rank may take less: so for each front one
number, the largest back, says all there is to say about a rank (:func:`frontiers`). And if the pace is close to the mean,
few states leave neither too much for the ranks to come nor took too much: :func:`evenest` visits only those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Moves = list[tuple[int, int]]
"""Units that each rank takes from the first and from the second sequence."""

ROUNDING = 1e-9
"""Relative slack of comparisons between sums that were added up in different orders."""
_CAP_TOLERANCE = 1e-4
"""Relative, of a least memory: it is for messages and for starts of further search."""


@dataclass(frozen=True)
class Load:
    """What some quantity, seconds or bytes, amounts to on a rank: ``base`` and what the units it takes add."""

    first: Floats
    """``first[k]``: of the first k units of the first sequence."""
    second: Floats
    """As ``first``, of the second sequence."""
    base: float = 0.0
    """Of the rank, whatever it takes."""


@dataclass(frozen=True)
class Sweeps:
    """The search's input, a tuple with one entry per rank each."""

    num_units: int
    """Of both sequences together, each counted once: V placement's sequences are the same units."""
    times: tuple[Load, ...]
    memory: tuple[tuple[Load, ...], ...]
    """All loads of a rank must stay within the cap."""
    least: tuple[tuple[int, int], ...]
    """Units that a rank takes at least from either sequence, 0 or 1. Above 0 only for the first and the last rank, or for all
    ranks that take from one sequence only."""
    least_together: tuple[int, ...]
    """From both sequences together, 0 or 1."""

    @property
    def lengths(self) -> tuple[int, int]:
        return len(self.times[0].first) - 1, len(self.times[0].second) - 1

    @property
    def separate(self) -> bool:
        """Whether each unit is in one sequence only."""
        return sum(self.lengths) == self.num_units

    @property
    def num_ranks(self) -> int:
        return len(self.times)


def within(limit: float) -> float:
    return limit * (1 + ROUNDING)


def frontiers(sweeps: Sweeps, pace: float, cap: float) -> list[Ints] | None:
    """The largest ``back`` at each ``front``, -1 if there is none, before the first rank and after each; None if the ranks
    cannot take all units.

    No rank is slower than ``pace`` or holds more than ``cap``. A relaxation: ranks but the first and the last may go empty.
    """
    length, depth = sweeps.lengths
    fronts = np.arange(length + 1)
    reach = np.full(length + 1, -1)
    reach[0] = 0
    result = [reach]
    for rank, time in enumerate(sweeps.times):
        if rank == sweeps.num_ranks - 1:  # what the last rank takes at least has to be left for it
            reach = np.minimum(reach, depth - sweeps.least[rank][1])
            reach[length + 1 - sweeps.least[rank][0] :] = -1
            result[-1] = reach
        room = pace - time.base
        if room < 0:
            return None
        widest = int((np.searchsorted(time.first, time.first + within(room), side="right") - 1 - fronts).max())
        before = fronts[:, None] - np.arange(widest + 1)
        start = np.where(before >= 0, reach[before], -1)
        found = np.where(start >= 0, depth, -1)
        for load, limit in ((time, pace), *((load, cap) for load in sweeps.memory[rank])):
            left = within(limit) - load.base - (load.first[:, None] - load.first[before])
            backs = np.searchsorted(load.second, load.second[start] + left, side="right") - 1
            found = np.minimum(found, np.where(left >= 0, backs, -1))
        reach = np.minimum(found.max(axis=1), sweeps.num_units - fronts)
        if rank == 0:
            first, second = sweeps.least[0]
            reach[:first] = -1
            reach[reach < second] = -1
        result.append(reach)
    return result if bool((reach + fronts == sweeps.num_units).any()) else None


def trace_of(sweeps: Sweeps, pace: float, cap: float) -> Moves:
    """Units of each rank in one way to what :func:`frontiers` finds possible."""
    reached = frontiers(sweeps, pace, cap)
    assert reached is not None
    fronts = np.arange(len(reached[0]))
    front = int(np.argmax(reached[-1] + fronts))
    back = sweeps.num_units - front
    moves: Moves = []
    for rank in reversed(range(sweeps.num_ranks)):
        starts = np.minimum(reached[rank][: front + 1], back)
        fits = starts >= 0
        for load, limit in ((sweeps.times[rank], pace), *((load, cap) for load in sweeps.memory[rank])):
            taken = load.first[front] - load.first[: front + 1] + load.second[back] - load.second[starts]
            fits &= load.base + taken <= within(limit)
        start = int(np.argmax(fits))
        moves.append((front - start, back - int(starts[start])))
        front, back = start, int(starts[start])
    return moves[::-1]


def least_limit(feasible: Callable[[float], bool], low: float, high: float, tolerance: float = ROUNDING / 10) -> float:
    """The smallest limit that is feasible, by bisection; ``high`` must be."""
    while high - low > tolerance * high:
        middle = (low + high) / 2
        low, high = (low, middle) if feasible(middle) else (middle, high)
    return high


def least_pace(
    alternatives: Sequence[Sweeps],
    cap: float = float("inf"),
    high: float = float("inf"),
    tolerance: float = ROUNDING / 10,
) -> tuple[float, Sweeps] | None:
    """The least possible time of the slowest rank, and the alternative that has it; None if none below ``high`` fits ``cap``.

    As :func:`frontiers` relaxes the problem, a memory cap can leave no way at this pace that gives each rank a unit. Without
    one there is: an empty rank can take a unit of the nearest rank with several, by way of those between.
    """
    pace, best = high, None
    for sweeps in alternatives:
        bases = [load.base for load in sweeps.times]
        total = sum(bases) + _whole(sweeps)
        at_most = min(pace * (1 - 10 * tolerance), total)
        if frontiers(sweeps, at_most, cap) is not None:
            low = max(total / sweeps.num_ranks, *bases) * (1 - ROUNDING)
            pace, best = least_limit(partial(_is_reachable, sweeps, cap=cap), low, at_most, tolerance), sweeps
    return None if best is None else (pace, best)


def least_cap(alternatives: Sequence[Sweeps]) -> tuple[float, Sweeps]:
    """The least possible memory of the fullest rank, however slow, and the alternative that has it."""
    cap, best = float("inf"), alternatives[0]
    for sweeps in alternatives:
        high = min(cap * (1 - _CAP_TOLERANCE), _everything(sweeps))
        if frontiers(sweeps, float("inf"), high) is not None:
            reachable = partial(_is_reachable, sweeps, float("inf"))
            cap, best = least_limit(reachable, 0.0, high, _CAP_TOLERANCE), sweeps
    return cap, best


def _is_reachable(sweeps: Sweeps, pace: float, cap: float) -> bool:
    return frontiers(sweeps, pace, cap) is not None


def _everything(sweeps: Sweeps) -> float:
    """More than any rank can hold."""
    return 1.0 + max(float(load.first[-1] + load.second[-1]) + load.base for loads in sweeps.memory for load in loads)


def _whole(sweeps: Sweeps) -> float:
    """Time of all units."""
    first, second = sweeps.times[0].first, sweeps.times[0].second
    return float(first[-1] + second[-1]) if sweeps.separate else float(first[-1])


def evenest(
    sweeps: Sweeps, pace: float, cap: float = float("inf"), *, below: float = float("inf"), minimax: bool = False
) -> tuple[float, Moves] | None:
    """Of all ways in which no rank is slower than ``pace`` or holds more than ``cap``, one with fewest empty stages, and of those
    the least sum of squared rank and stage times.

    Args:
        below: only ways that cost less.
        minimax: instead, one whose slowest rank is fastest.

    Returns:
        Cost and units of each rank; None if there is no such way. The cost is the sum of squares, and for each empty stage
        more than any sum of squares; with ``minimax`` the slowest rank's time.
    """
    length, depth = sweeps.lengths
    width, whole = depth + 1, _whole(sweeps)
    per_empty = _per_empty(sweeps)
    # What the ranks after each can take at most.
    later = np.concatenate([np.cumsum([max(0.0, pace - load.base) for load in sweeps.times[::-1]])[::-1], [0.0]])
    first, second = sweeps.times[0].first, sweeps.times[0].second

    fronts, backs, costs = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1)
    choices: list[Ints] = []
    for rank, time in enumerate(sweeps.times):
        best = np.full((length + 1) * width, np.inf)
        choice = np.zeros((length + 1) * width, np.int64)
        loads = ((time, within(pace)), *((load, within(cap)) for load in sweeps.memory[rank]))
        room = within(pace) - time.base
        widest = int((np.searchsorted(first, first[fronts] + room, side="right") - 1 - fronts).max())
        for down in range(sweeps.least[rank][0], widest + 1):
            inside = (fronts + down <= length) & (fronts + down + backs <= sweeps.num_units)
            front, back, cost = fronts[inside] + down, backs[inside], costs[inside]
            # Fewest and most units of the second sequence that go with them.
            most = np.minimum(depth, sweeps.num_units - front) - back
            for load, limit in loads:
                left = limit - load.base - (load.first[front] - load.first[front - down])
                ends = np.searchsorted(load.second, load.second[back] + left, side="right") - 1
                most = np.minimum(most, np.where(left >= 0, ends - back, -1))
            behind = whole * (1 - ROUNDING) - first[front] - within(float(later[rank + 1]))
            fewest = np.searchsorted(second, behind, side="left") - back
            fewest = np.maximum(fewest, sweeps.least[rank][1] if down >= sweeps.least_together[rank] else 1)
            counts = np.maximum(0, most - fewest + 1)
            if not counts.any():
                continue
            source = np.repeat(np.arange(len(front)), counts)
            up = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts) + fewest[source]
            front, back = front[source], back[source]
            down_time = first[front] - first[front - down]
            up_time = second[back + up] - second[back]
            rank_time = time.base + down_time + up_time
            if minimax:
                total = np.maximum(cost[source], rank_time)
            else:
                total = cost[source] + rank_time**2 + down_time**2 + up_time**2
                if down == 0:
                    total += per_empty
                if depth:
                    total[up == 0] += per_empty
            state = front * width + back + up
            np.minimum.at(best, state, total)
            won = best[state] == total
            choice[state[won]] = down * width + up[won]
        states = np.flatnonzero(np.isfinite(best))
        fronts, backs, costs = states // width, states % width, best[states]
        if below < np.inf and not minimax:
            hopeful = costs + least_to_come(sweeps, rank + 1, fronts, backs) < below
            fronts, backs, costs = fronts[hopeful], backs[hopeful], costs[hopeful]
        if not len(fronts):
            return None
        choices.append(choice)

    done = np.flatnonzero(fronts + backs == sweeps.num_units)
    if not len(done):
        return None
    last = done[np.argmin(costs[done])]
    at, moves = (int(fronts[last]), int(backs[last])), []
    for choice in reversed(choices):
        moves.append(divmod(int(choice[at[0] * width + at[1]]), width))
        at = at[0] - moves[-1][0], at[1] - moves[-1][1]
    return float(costs[last]), moves[::-1]


def rank_times(sweeps: Sweeps, moves: Moves) -> Floats:
    """Seconds of each rank."""
    firsts, seconds = zip(*moves, strict=True)
    first = np.diff(sweeps.times[0].first[np.cumsum([0, *firsts])])
    second = np.diff(sweeps.times[0].second[np.cumsum([0, *seconds])])
    bases = np.array([load.base for load in sweeps.times])
    times: Floats = first + second + bases
    return times


def unevenness(sweeps: Sweeps, moves: Moves) -> float:
    """What :func:`evenest` makes least."""
    firsts, seconds = zip(*moves, strict=True)
    first = np.diff(sweeps.times[0].first[np.cumsum([0, *firsts])])
    second = np.diff(sweeps.times[0].second[np.cumsum([0, *seconds])])
    empty = firsts.count(0) + (seconds.count(0) if sweeps.lengths[1] else 0)
    return float((first**2 + second**2 + rank_times(sweeps, moves) ** 2).sum()) + empty * _per_empty(sweeps)


def _per_empty(sweeps: Sweeps) -> float:
    return 4.0 * (_whole(sweeps) + sum(load.base for load in sweeps.times)) ** 2


def evenest_of(
    alternatives: Sequence[Sweeps],
    pace: float,
    cap: float = float("inf"),
    *,
    below: float = float("inf"),
    minimax: bool = False,
) -> tuple[float, Moves] | None:
    """The best that :func:`evenest` finds in any of the alternatives, those with the most hope first."""
    start = np.zeros(1, np.int64)
    hopes = [float(least_to_come(sweeps, 0, start, start)[0]) for sweeps in alternatives]
    least, best = below, None
    for index in sorted(range(len(alternatives)), key=hopes.__getitem__):
        if not minimax and hopes[index] >= least:
            break
        if len(alternatives) > 1 and frontiers(alternatives[index], pace, cap) is None:
            continue  # known sooner than by the search
        found = evenest(alternatives[index], pace, cap, below=least, minimax=minimax)
        if found is not None and found[0] < least:
            least, best = found[0], found
    return best


def least_to_come(sweeps: Sweeps, rank: int, fronts: Ints, backs: Ints) -> Floats:
    """A bound from below of what ranks from ``rank`` on add to a sum of squares, if the ones before leave off at these states.

    It is what they would add if they could share the rest evenly, but that the last rank has the last unit in any case.
    """
    count = sweeps.num_ranks - rank
    if count == 0:
        return np.zeros(len(fronts))
    first, second = sweeps.times[0].first, sweeps.times[0].second
    heaviest = float(second[-1] - second[-2]) if sweeps.least[-1][1] else 0.0
    rest = _whole(sweeps) - first[fronts] - second[backs]
    if sweeps.separate:
        rest_second = second[-1] - second[backs]
        stages = _even_squares(rest - rest_second, count, 0.0) + _even_squares(rest_second, count, heaviest)
    else:
        stages = _even_squares(rest, 2 * count, heaviest)
    bases = sum(load.base for load in sweeps.times[rank:])
    return stages + _even_squares(rest + bases, count, heaviest)


def _even_squares(total: Floats, count: int, largest: float) -> Floats:
    """The least sum of squares of ``count`` numbers that sum to ``total``, one of them at least ``largest``."""
    if count == 1:
        return total**2
    one = np.maximum(total / count, largest)
    return one**2 + (total - one) ** 2 / (count - 1)
