"""Memory limit: what partitions of a model fit the devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

from dist_mtp.errors import ConfigError
from dist_mtp.pipeline.table import Kind, Table


class DoesNotFit(ConfigError):
    """No plan keeps the memory limit; the message names the rank, its bytes, the limit, and what would help."""


InFlight = tuple[tuple[tuple[int, ...], ...], ...]
"""``in_flight[rank]`` holds combinations, each with the microbatches in flight at once on each of the rank's stages, in
pipeline order."""


@dataclass(frozen=True)
class MemoryLimit:
    """The most bytes that a rank may hold, and what decides how many it holds.

    A rank with units U_s on its stages s fits if, for each of its combinations,
    ``extra + sum over s of (static of U_s + in_flight[s] * activations of U_s) <= bytes``. Activations of a unit and
    microbatch are :attr:`~dist_mtp.pipeline.costs.UnitCost.activation_bytes`.
    """

    bytes: float
    """Cap of each rank."""
    static_bytes: tuple[float, ...]
    """Of each unit, on the rank that holds it: weights, gradients, optimizer state."""
    extra_bytes: tuple[float, ...]
    """Of each rank, whatever its units: the embedding's replica."""
    in_flight: InFlight
    """Of each rank; see :func:`in_flight_combinations`."""


def in_flight_combinations(table: Table, stage_to_rank: Sequence[int]) -> InFlight:
    """Microbatches in flight on a rank's stages, at the moments that may need the most memory.

    F adds one to its stage, W and B take it away. When a rank's memory is largest depends on its units. But memory is a sum over
    stages, so it is always largest at a combination that no other, and no mean of two others, equals or exceeds on all stages;
    only those are returned, in order of their first time.

    ``0F0 0F1 1F0 1B0 0B0 0B1`` on one rank with stages 0 and 1 gives ``((2, 1),)``.
    """
    result = []
    for rank, actions in enumerate(table):
        stages = [stage for stage, owner in enumerate(stage_to_rank) if owner == rank]
        now, seen, grew = dict.fromkeys(stages, 0), {tuple(0 for _ in stages): None}, False
        for action in actions:
            if action.kind is Kind.F:
                now[action.stage] += 1
                grew = True
            elif action.kind in (Kind.W, Kind.B):
                if grew:  # memory is largest just before some of it is freed
                    seen[tuple(now.values())] = None
                now[action.stage] -= 1
                grew = False
        if grew:
            seen[tuple(now.values())] = None
        # Those that a single one exceeds first: of the rest there are few pairs.
        most = [counts for counts in seen if not any(_mean_exceeds(other, other, counts) for other in seen)]
        for counts in tuple(most):
            if any(_mean_exceeds(*pair, counts) for pair in combinations(most, 2)):
                most.remove(counts)
        result.append(tuple(most))
    return tuple(result)


def _mean_exceeds(first: tuple[int, ...], second: tuple[int, ...], counts: tuple[int, ...]) -> bool:
    """Whether ``x * first + (1 - x) * second``, for some x from 0 to 1, is nowhere less than ``counts``, which is neither."""
    if counts in (first, second):
        return False
    low, high = Fraction(0), Fraction(1)
    for a, b, least in zip(first, second, counts, strict=True):
        if a > b:
            low = max(low, Fraction(least - b, a - b))
        elif a < b:
            high = min(high, Fraction(b - least, b - a))
        elif a < least:
            return False
    return low <= high
