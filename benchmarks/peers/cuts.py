"""The best cut into whole layers that a pipeline can have under its own schedule, by simulation.

Peers are given it as if their users had searched for it; none of them has such a search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, product

from dist_mtp.pipeline import schedules
from dist_mtp.pipeline.costs import UnitCost, total_cost
from dist_mtp.pipeline.partition import partition
from dist_mtp.pipeline.simulate import simulate
from dist_mtp.pipeline.table import Action, Kind, Table

Borders = tuple[int, ...]
"""Stage s holds the layers ``borders[s]`` to ``borders[s + 1] - 1``."""

_SLACKS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)


def line(num_ranks: int) -> tuple[int, ...]:
    """Rank of each stage with one stage per rank."""
    return tuple(range(num_ranks))


def vee(num_ranks: int) -> tuple[int, ...]:
    """Rank of each stage of a V."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def whole_layers(units: Sequence[UnitCost]) -> list[UnitCost]:
    """Costs of embedding, layers and head from those of embedding, two halves per layer and head."""
    halves = units[1:-1]
    layers = [total_cost(pair) for pair in zip(halves[::2], halves[1::2], strict=True)]
    return [units[0], *layers, units[-1]]


def stage_costs(layers: Sequence[UnitCost], borders: Borders) -> list[UnitCost]:
    return [total_cost(layers[start:stop]) for start, stop in pairwise(borders)]


def table_of(schedule: str, stage_to_rank: Sequence[int], micro_batches: int, *, splits: bool = True) -> Table:
    """The table of a schedule; without ``splits`` all of a backward happens where its input gradient would."""
    table = schedules.build(schedule, max(stage_to_rank) + 1, stage_to_rank, micro_batches)
    if splits:
        return table
    whole = {Kind.F: Kind.F, Kind.I: Kind.B, Kind.B: Kind.B}
    return tuple(
        tuple(Action(whole[a.kind], a.stage, a.microbatch) for a in actions if a.kind is not Kind.W)
        for actions in table
    )


def best_cut(layers: Sequence[UnitCost], stage_to_rank: Sequence[int], table: Table) -> tuple[Borders, float]:
    """The cut with the shortest simulated step, and that step's seconds.

    Starts from the best of the planner's partitions of whole layers, and moves borders by one layer, alone or with the
    border that mirrors it, as long as that helps.
    """

    def seconds(borders: Borders) -> float:
        return simulate(table, stage_costs(layers, borders), stage_to_rank).step_time

    starts = {
        tuple(accumulate((len(units) for units in partition(layers, stage_to_rank, slack=slack)), initial=0))
        for slack in _SLACKS
    }
    shortest, best = min((seconds(borders), borders) for borders in starts)
    while True:
        found, borders = min((seconds(borders), borders) for borders in _neighbours(best))
        if found >= shortest:
            return best, shortest
        shortest, best = found, borders


def _neighbours(borders: Borders) -> Iterator[Borders]:
    inner = range(1, len(borders) - 1)
    yield borders
    for border in inner:
        mirror = len(borders) - 1 - border
        for step, mirror_step in product((-1, 1), (-1, 0, 1)):
            moved = list(borders)
            moved[border] += step
            if mirror != border:
                moved[mirror] += mirror_step
            if all(start < stop for start, stop in pairwise(moved)):
                yield tuple(moved)
