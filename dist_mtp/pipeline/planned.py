"""``planned``: search for the partition and the order of actions with the shortest simulated step.

A candidate is a partition and a *recipe* for its table: a policy of :mod:`~dist_mtp.pipeline.list_schedule`, or a registered
pattern whose weight gradients :mod:`~dist_mtp.pipeline.weight_filling` places anew. The search tries a few recipes on the
balanced partitions it is given, then moves from the best candidate to better neighbours: recipes with one other setting, and
partitions with one unit moved. Registered schedules compete as they are, too. All candidates keep the ranks' memory.

Nothing here is random and no clock is read, so every rank finds the same plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from dist_mtp.pipeline import schedules
from dist_mtp.pipeline.costs import UnitCost, stage_costs
from dist_mtp.pipeline.list_schedule import ListSchedule, Policy, Step, list_schedule
from dist_mtp.pipeline.partition import Partition, contiguous
from dist_mtp.pipeline.simulate import peak_activations, simulate
from dist_mtp.pipeline.table import Table
from dist_mtp.pipeline.weight_filling import fill_weights, forward_and_input_order

_EFFORT = 300_000
"""Actions that a search schedules in total, about 3 µs each."""
_TRY = 100
"""What a candidate costs besides its actions."""
_LOOK = 1
"""What it costs, per stage, to see that a partition cannot be better."""
_CLIMBS = 6
"""Candidates from which it climbs at most, best first."""
_CLIMB_TRIES = 30
"""Candidates that a climb should be able to try."""


@dataclass(frozen=True)
class FilledPattern:
    """The recipe of a registered schedule with its weight gradients placed anew."""

    name: str
    patience: float = 0.1
    """See :func:`~dist_mtp.pipeline.weight_filling.fill_weights`."""


Recipe = Policy | FilledPattern

_POLICIES = tuple(
    Policy(kept_room=room, forward_patience=forward, weight_patience=weight, drain_patience=drain, draining=draining)
    for room in (1.0, 0.0)
    for forward, weight, drain, draining in (
        (1.2, 0.15, 0.3, None),
        (0.5, 0.0, 0.6, 5),
        (1.0, 0.0, 0.3, 5),
        (0.7, 0.3, 0.6, None),
    )
)
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "kept_room": (0.0, 0.5, 1.0, 2.0),
    "kept_room_per_rank": (0.5, 0.75, 1.0, 1.25),
    "forward_patience": (0.0, 0.3, 0.5, 0.7, 1.0, 1.2),
    "filling": (1, 2, 4),
    "weight_patience": (0.0, 0.15, 0.3),
    "drain_patience": (0.3, 0.6, 1.0),
    "draining": (None, 0, 2, 5, 8),
}
"""What each field of a policy is set to."""
_PATIENCES = (0.0, 0.1, 0.3, 0.6)


@dataclass(frozen=True)
class Problem:
    """What is to be planned."""

    costs: Sequence[UnitCost]
    """One per unit."""
    stage_to_rank: Sequence[int]
    micro_batches: int
    message_seconds: float
    activation_caps: Callable[[Partition], Sequence[float]]
    """Bytes of activations that each rank may hold under a partition."""
    patterns: Sequence[str]
    """Registered schedules that run on this placement with this many microbatches."""

    @property
    def num_ranks(self) -> int:
        return max(self.stage_to_rank) + 1

    @cached_property
    def trial_micro_batches(self) -> int:
        """Enough for a step's beginning, middle and end: what further ones add is known from the middle."""
        return min(self.micro_batches, 4 * self.num_ranks)

    @cached_property
    def pattern_order(self) -> Callable[[str, int], list[list[Step]]]:
        """F and I of a pattern, by name and microbatches. Made once: trials of all partitions follow the same."""
        return cache(
            lambda name, micro_batches: forward_and_input_order(
                schedules.build(name, self.num_ranks, self.stage_to_rank, micro_batches)
            )
        )


@dataclass(frozen=True)
class Found:
    """The winner."""

    partition: Partition
    table: Table
    step_time: float
    """Simulated, seconds."""
    origin: str
    """``list`` (scheduled by a policy), ``zbv+`` (a pattern with weight gradients placed anew) or ``zbv`` (as registered)."""


@dataclass(frozen=True)
class _Candidate:
    cut: Partition
    recipe: Recipe


def search(
    problem: Problem, cuts: Sequence[Partition], *, move_units: bool = True, effort: float = 1.0
) -> Found | None:
    """The best plan found, or None if nothing fits into the ranks' memory.

    Args:
        cuts: partitions to begin with, at least one.
        move_units: also try partitions that are not among ``cuts``.
        effort: candidates to try, relative to the usual number.
    """
    trials = _Trials(problem, effort * _EFFORT)
    recipes: list[Recipe] = [*_POLICIES, *(FilledPattern(name) for name in problem.patterns)]
    for recipe in recipes:
        for cut in cuts:
            if trials.effort_left > 0:
                trials.time(_Candidate(cut, recipe))
    # Large pipelines take longer to schedule: rather climb from fewer candidates than not get far from any.
    climbs = int(trials.effort_left / (_CLIMB_TRIES * trials.effort_of(cuts[0])))
    starts = trials.fastest(max(1, min(_CLIMBS, climbs)))
    for climbs_left, (time, candidate) in zip(range(len(starts), 0, -1), starts, strict=True):
        _climb(time, candidate, trials, trials.effort_left / climbs_left, problem.stage_to_rank if move_units else None)

    found = [plan for name in problem.patterns for plan in _as_registered(problem, name, cuts)]
    # The trials' times are estimates where they had fewer microbatches: the winner is one of the first few.
    finalists = 1 if problem.trial_micro_batches == problem.micro_batches or effort < 1 else 8
    for _, candidate in trials.fastest(10 * finalists):
        result = _schedule(problem, candidate, problem.micro_batches)
        if result is None:  # fitted with the trial's microbatches only
            continue
        origin = "list" if isinstance(candidate.recipe, Policy) else f"{candidate.recipe.name}+"
        found.append(Found(candidate.cut, result.table(), result.step_time, origin))
        finalists -= 1
        if finalists == 0:
            break
    return min(found, key=lambda plan: plan.step_time, default=None)


def _climb(
    time: float, candidate: _Candidate, trials: _Trials, effort: float, stage_to_rank: Sequence[int] | None
) -> None:
    """Move to the first better neighbour until there is none, or ``effort`` is spent."""
    leave, improved = trials.effort_left - effort, True
    while improved:
        improved = False
        for neighbour in _neighbours(candidate, stage_to_rank):
            if trials.effort_left <= leave:
                return
            other = trials.time(neighbour, below=time)
            if other is not None and other < time * (1 - 1e-9):
                time, candidate, improved = other, neighbour, True
                break


def _neighbours(candidate: _Candidate, stage_to_rank: Sequence[int] | None) -> Iterator[_Candidate]:
    """Other recipes and, with ``stage_to_rank``, other partitions in turn."""
    moved = iter(()) if stage_to_rank is None else moved_units(candidate.cut, stage_to_rank)
    cuts = (replace(candidate, cut=cut) for cut in moved)
    recipes = (replace(candidate, recipe=recipe) for recipe in _other_recipes(candidate.recipe))
    for pair in itertools.zip_longest(recipes, cuts):
        yield from (neighbour for neighbour in pair if neighbour is not None)


def _other_recipes(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes with one other setting."""
    if isinstance(recipe, FilledPattern):
        yield from (replace(recipe, patience=patience) for patience in _PATIENCES if patience != recipe.patience)
        return
    for name, values in _SETTINGS.items():
        for value in values:
            if value != getattr(recipe, name):
                yield replace(recipe, **{name: value})


def moved_units(cut: Partition, stage_to_rank: Sequence[int]) -> Iterator[Partition]:
    """Partitions in which one unit less is on one stage and one more on another, near ones first.

    Both ends of the model stay where they are, and no rank is left without a unit.
    """
    counts = [len(units) for units in cut]
    on_rank = [0] * (max(stage_to_rank) + 1)
    for rank, count in zip(stage_to_rank, counts, strict=True):
        on_rank[rank] += count

    def can_give(stage: int) -> bool:
        kept = 1 if stage in (0, len(counts) - 1) else 0
        return counts[stage] > kept and on_rank[stage_to_rank[stage]] > 1

    for distance in range(1, len(counts)):
        for first in range(len(counts) - distance):
            for source, target in ((first, first + distance), (first + distance, first)):
                if can_give(source):
                    moved = list(counts)
                    moved[source] -= 1
                    moved[target] += 1
                    yield contiguous(moved)


class _Trials:
    """Schedules candidates with few microbatches, remembers their times, and counts the effort."""

    def __init__(self, problem: Problem, effort: float) -> None:
        self._problem = problem
        self._times: dict[_Candidate, float | None] = {}
        self.effort_left = effort
        """Actions that may still be scheduled."""

    def effort_of(self, cut: Partition) -> float:
        """What one trial takes."""
        return _TRY + 3 * self._problem.trial_micro_batches * len(cut)

    def time(self, candidate: _Candidate, below: float = float("inf")) -> float | None:
        """Estimated step time; None if the candidate does not fit, or cannot be faster than ``below``."""
        if candidate not in self._times:
            problem = self._problem
            if problem.micro_batches * _pace(problem, candidate.cut) >= below:
                self.effort_left -= _LOOK * len(candidate.cut)
                return None
            few = problem.trial_micro_batches
            result = _schedule(problem, candidate, few)
            self.effort_left -= self.effort_of(candidate.cut)
            time = None
            if result is not None:
                # Where memory is short, ranks wait in the middle of a step, too.
                period = max(result.period, _pace(problem, candidate.cut))
                time = result.step_time + (problem.micro_batches - few) * period
            self._times[candidate] = time
        return self._times[candidate]

    def fastest(self, count: int) -> list[tuple[float, _Candidate]]:
        """Best first."""
        known = [(time, candidate) for candidate, time in self._times.items() if time is not None]
        return sorted(known, key=lambda pair: pair[0])[:count]


def _pace(problem: Problem, cut: Partition) -> float:
    """Seconds of the slowest rank per microbatch."""
    seconds = [0.0] * problem.num_ranks
    for rank, units in zip(problem.stage_to_rank, cut, strict=True):
        seconds[rank] += sum(problem.costs[unit].time for unit in units)
    return max(seconds)


def _schedule(problem: Problem, candidate: _Candidate, micro_batches: int) -> ListSchedule | None:
    """None if one microbatch, or the pattern's order, does not fit into the ranks' memory."""
    costs, caps = stage_costs(problem.costs, candidate.cut), problem.activation_caps(candidate.cut)
    arguments = (costs, problem.stage_to_rank, micro_batches, caps, problem.message_seconds)
    if isinstance(candidate.recipe, FilledPattern):
        order = problem.pattern_order(candidate.recipe.name, micro_batches)
        return fill_weights(order, *arguments, patience=candidate.recipe.patience)
    try:
        return list_schedule(*arguments, policy=candidate.recipe)
    except ValueError:
        return None


def _as_registered(problem: Problem, name: str, cuts: Sequence[Partition]) -> Iterator[Found]:
    """A registered schedule under each partition that fits."""
    table = schedules.build(name, problem.num_ranks, problem.stage_to_rank, problem.micro_batches)
    for cut in cuts:
        costs, caps = stage_costs(problem.costs, cut), problem.activation_caps(cut)
        peaks = peak_activations(table, costs)
        if all(peak <= cap for peak, cap in zip(peaks, caps, strict=True)):
            timeline = simulate(table, costs, problem.stage_to_rank, problem.message_seconds)
            yield Found(cut, table, timeline.step_time, name)
