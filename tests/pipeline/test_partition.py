"""Partitions against exhaustive search."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence

import pytest
from pipeline.pipeline_cases import v3_config, v_ranks

from dist_mtp.errors import ConfigError
from dist_mtp.pipeline.costs import UnitCost, unit_costs
from dist_mtp.pipeline.devices import PROFILES
from dist_mtp.pipeline.partition import Partition, partition


def costs_of(times: Sequence[float]) -> list[UnitCost]:
    return [UnitCost(time_f=time / 3, time_i=time / 3, time_w=time / 3) for time in times]


def every_partition(num_units: int, num_stages: int) -> Iterator[Partition]:
    for cuts in itertools.combinations(range(1, num_units), num_stages - 1):
        yield tuple(tuple(range(a, b)) for a, b in itertools.pairwise((0, *cuts, num_units)))


def slowest_rank(cut: Partition, times: Sequence[float], ranks: Sequence[int]) -> float:
    totals = dict.fromkeys(ranks, 0.0)
    for stage, units in enumerate(cut):
        totals[ranks[stage]] += sum(times[unit] for unit in units)
    return max(totals.values())


@pytest.mark.parametrize(
    "ranks", [v_ranks(1), v_ranks(2), v_ranks(3), v_ranks(4), (0,), (0, 1), (0, 1, 2, 3)], ids=lambda ranks: str(ranks)
)
def test_auto_is_as_fast_as_the_best_of_all_partitions(ranks: tuple[int, ...]) -> None:
    """The slowest rank's time equals the minimum over every partition, whatever the costs."""
    rng = random.Random(len(ranks))
    for num_units in range(len(ranks), 12):
        for heavy in (1, 10):
            times = [rng.choice([0.001, 0.5, 1.0, 1.3, rng.random()]) for _ in range(num_units)]
            times[-1] *= heavy
            found = partition(costs_of(times), ranks)
            flat = [unit for units in found for unit in units]
            assert flat == list(range(num_units)), f"{found} is no partition of {num_units} units"
            assert all(found), f"{found} has an empty stage"
            ours = slowest_rank(found, times, ranks)
            best = min(slowest_rank(cut, times, ranks) for cut in every_partition(num_units, len(ranks)))
            assert ours == pytest.approx(best), f"{times}: {ours} with {found}, the best is {best}"


def test_interleaved_has_the_fastest_slowest_stage() -> None:
    """With more than two stages per rank, or two not in a V, the slowest stage is as fast as possible."""
    times = [0.2, 1.0, 1.4, 1.0, 1.4, 1.0, 1.4, 1.0, 1.4, 3.0]
    ranks = (0, 1, 0, 1, 0, 1)
    stages = tuple(range(len(ranks)))  # as if each stage had a rank of its own
    ours = slowest_rank(partition(costs_of(times), ranks), times, stages)
    best = min(slowest_rank(cut, times, stages) for cut in every_partition(len(times), len(stages)))
    assert ours == pytest.approx(best), f"{ours} != {best}"


def test_ties_are_broken_towards_even_stages() -> None:
    """One heavy unit sets the pace; the other ranks are as even as can be all the same."""
    counts = [len(units) for units in partition(costs_of([1.0] * 9 + [6.0]), (0, 1, 2, 3))]
    assert counts == [3, 3, 3, 1], counts
    counts = [len(units) for units in partition(costs_of([1.0] * 12), v_ranks(2))]
    assert counts == [3, 3, 3, 3], counts


@pytest.mark.parametrize("slack", [0.0, 0.05])
@pytest.mark.parametrize("ranks", [v_ranks(2), v_ranks(3), (0, 1, 2, 3, 4)], ids=lambda ranks: str(ranks))
def test_least_sum_of_squares_within_the_slack(ranks: tuple[int, ...], slack: float) -> None:
    """Among the partitions at most ``slack`` slower than the fastest, none has more even ranks and stages.

    A breach is a larger sum of squared times than the best, or a smaller one, bought with more slack than was allowed.
    """
    rng = random.Random(7)

    def spread(cut: Partition) -> float:
        stages = [sum(times[unit] for unit in units) for units in cut]
        totals = [sum(time for time, rank in zip(stages, ranks, strict=True) if rank == r) for r in set(ranks)]
        return sum(time * time for time in stages + totals)

    for _ in range(100):
        times = [rng.uniform(0.5, 2.0) for _ in range(10)] + [rng.uniform(2.0, 4.0)]
        found = partition(costs_of(times), ranks, slack=slack)
        cuts = list(every_partition(len(times), len(ranks)))
        pace = (1 + slack) * min(slowest_rank(cut, times, ranks) for cut in cuts)
        best = min(spread(cut) for cut in cuts if slowest_rank(cut, times, ranks) <= pace + 1e-7)
        assert spread(found) == pytest.approx(best), f"{times}: {spread(found)} with {found}, the best is {best}"


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_deepseek_v3_on_16_ranks_is_quick(depth: int) -> None:
    """124 units on 32 stages take a second at most, generously three on a busy machine."""
    costs = unit_costs(v3_config(depth=depth), PROFILES["h100"])
    start = time.process_time()
    partition(costs, v_ranks(16))
    took = time.process_time() - start
    assert took < 3, f"took {took:.1f} s"


def test_uniform() -> None:
    """Equal counts; earlier stages take the remainder."""
    counts = [len(units) for units in partition(costs_of([1.0] * 11), (0, 1, 2, 3), "uniform")]
    assert counts == [3, 3, 3, 2], counts


def test_explicit() -> None:
    found = partition(costs_of([1.0] * 10), (0, 1, 1, 0), "3,2,2,3")
    assert found == ((0, 1, 2), (3, 4), (5, 6), (7, 8, 9)), found


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("3,2,2", "lists 3 stages, parallel.pp and pipeline.placement make 4: list 4 numbers that add up to 10"),
        ("3,2,2,4", "places 11 units, the model has 10"),
        ("0,2,2,6", "a stage with 0 units"),
        ("even", "neither auto, uniform nor a list"),
        ("3,2,2,", "neither auto, uniform nor a list"),
    ],
)
def test_wrong_layouts_name_both_numbers(layout: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        partition(costs_of([1.0] * 10), (0, 1, 1, 0), layout)


def test_too_few_units() -> None:
    with pytest.raises(ConfigError, match="4 stages need at least 4 pipeline units, the model has 3"):
        partition(costs_of([1.0] * 3), (0, 1, 1, 0))
