"""The choice of partition and table: what of all that is possible a run takes.

A plan keeps to the memory of its devices where it can. Under ``pipeline.recompute=auto`` it recomputes what makes it fastest
within that memory, which is nothing while everything fits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_mtp.config import Config
from dist_mtp.config_checks import micro_batch_problem
from dist_mtp.pipeline import schedules
from dist_mtp.pipeline.costs import UnitCost, stage_costs, total_cost, unit_parameters
from dist_mtp.pipeline.devices import DeviceProfile
from dist_mtp.pipeline.layout import read_layout
from dist_mtp.pipeline.memory import rank_memory
from dist_mtp.pipeline.memory_limit import DoesNotFit, MemoryLimit, in_flight_combinations
from dist_mtp.pipeline.partition import Partition, partition, partition_candidates
from dist_mtp.pipeline.placement import embedding_has_two_copies, stage_ranks
from dist_mtp.pipeline.planned import Problem, search
from dist_mtp.pipeline.simulate import Timeline, peak_activations, simulate
from dist_mtp.pipeline.table import Table
from dist_mtp.pipeline.unit_times import planned_costs
from dist_mtp.recompute import KEEP_ALL, RECOMPUTE_LEVELS, Recompute

SLACKS = (0.0, 0.01, 0.02, 0.05, 0.1)
"""How much slower than the least possible the slowest rank may be in the partitions that ``layout=auto`` compares."""
_FEW_SLACKS = (0.02,)
"""The same where a plan is made only to be compared."""
_USABLE = 0.9
"""Share of a device's memory that is planned with: the rest is for the moment's buffers and fragmentation."""
_ACTIVATIONS = 1.1
"""Activations of a rank under ``planned``, relative to those of the fullest rank under ``1f1b``."""
_LEVEL_EFFORT = 0.5
"""Of the search of one of several recompute levels."""
_GLANCE = 0.02
"""Of a search that only looks what there is to hold."""


@dataclass(frozen=True)
class Choice:
    """What is computed where, in which order, and what that is predicted to cost."""

    recompute: Recompute
    costs: tuple[UnitCost, ...]
    """One per unit."""
    cut: Partition
    table: Table
    timeline: Timeline
    origin: str
    """Of the table: a registered schedule, or how ``planned`` made it."""
    memory_limit: float | None
    """Bytes of a rank; None where memory is not limited."""
    fits: bool
    """Whether every rank keeps the limit."""
    is_squeezed: bool
    """Whether ``planned`` would hold more microbatches at once if there were more memory."""
    notes: tuple[str, ...]
    """What of ``pipeline.layout`` was not followed to the letter."""


def choose(config: Config, profile: DeviceProfile, message_seconds: float, *, effort: float = 1.0) -> Choice:
    """Choose for a configuration.

    Args:
        message_seconds: between neighbouring ranks.
        effort: of ``planned``'s search, relative to that of a run.

    Raises:
        DoesNotFit: nothing fits into ``pipeline.memory_gb``.
        ConfigError: too few units, a layout that does not fit the model, or bad measured times.
    """
    limit = memory_limit(config, profile)
    if effort < 1 and config.pipeline.schedule != "planned":
        # Patterns cannot be made to need less, and a partition that would is rarely worth the time that it takes to find.
        limit = None
    levels = _levels(config, limit)
    budget = float("inf")
    if config.pipeline.schedule == "planned":
        # The measure stays 1F1B with nothing recomputed: put-off weight gradients need more than what recomputation leaves.
        budget = _ACTIVATIONS * _one_f_one_b_peak(planned_costs(config, profile, KEEP_ALL), config)

    def attempt(level: Recompute, limit: float | None, effort: float) -> Choice:
        return _choose(config, planned_costs(config, profile, level), level, message_seconds, budget, limit, effort)

    if len(levels) > 1 and _keeps(config, attempt(levels[0], None, effort * _GLANCE), limit):
        # There is room for all that one would like to hold: to recompute anything would only take longer.
        with contextlib.suppress(DoesNotFit):
            return attempt(levels[0], limit, effort)
    # To recompute more frees memory, which mostly shortens the step until there is enough of it: so come down from everything
    # as long as the step gets shorter. Not everything that fits needs less than what does not: whole units need most at once.
    fitting: list[Choice] = []
    failure: DoesNotFit | None = None
    for level in reversed(levels):
        try:
            fitting.append(attempt(level, limit, effort * (_LEVEL_EFFORT if len(levels) > 1 else 1.0)))
        except DoesNotFit as error:
            failure = failure or error
        if len(fitting) > 1 and fitting[-1].timeline.step_time > fitting[-2].timeline.step_time:
            break
    if fitting:
        return min(fitting, key=lambda choice: choice.timeline.step_time)
    assert failure is not None
    if config.pipeline.memory_gb is not None:
        raise failure
    needs = {level: fullest_rank_bytes(config, attempt(level, None, effort * _GLANCE)) for level in levels}
    unlimited = attempt(min(levels, key=needs.__getitem__), None, effort)
    return dataclasses.replace(unlimited, memory_limit=limit, fits=False)


def memory_limit(config: Config, profile: DeviceProfile) -> float | None:
    """Bytes that a rank may hold; None without a limit."""
    if config.pipeline.memory_gb is not None:
        return config.pipeline.memory_gb * 1e9
    return None if profile.memory_bytes is None else _USABLE * profile.memory_bytes


def costs_with_replica(config: Config, choice: Choice) -> list[UnitCost]:
    """Cost of each stage; parameters of the last one include the embedding's replica if there is one."""
    costs = stage_costs(choice.costs, choice.cut)
    if embedding_has_two_copies(config, stage_ranks(config)):
        costs[-1] = total_cost([costs[-1], UnitCost(params=choice.costs[0].params)])
    return costs


def _keeps(config: Config, choice: Choice, limit: float | None) -> bool:
    """Whether a choice made without limit keeps it."""
    return limit is None or fullest_rank_bytes(config, choice) <= limit


def fullest_rank_bytes(config: Config, choice: Choice) -> int:
    """What the rank that needs most holds: weights, gradients, optimizer state and activations."""
    ranks, costs = stage_ranks(config), costs_with_replica(config, choice)
    return max(
        rank_memory(
            config, rank, total_cost(cost for owner, cost in zip(ranks, costs, strict=True) if owner == rank), peak
        ).total_bytes
        for rank, peak in enumerate(choice.timeline.peak_activation_bytes)
    )


def _levels(config: Config, limit: float | None) -> list[Recompute]:
    if config.pipeline.recompute != "auto" or limit is None:
        return [config.recompute]
    return [level for level in RECOMPUTE_LEVELS if level.runs_with(config.moe.dispatcher)]


def _choose(
    config: Config,
    costs: tuple[UnitCost, ...],
    level: Recompute,
    message_seconds: float,
    budget: float,
    limit: float | None,
    effort: float,
) -> Choice:
    """Under one recompute level; raises DoesNotFit.

    Args:
        budget: bytes of activations that ``planned`` gives each rank.
    """
    stage_to_rank, micro_batches, layout = stage_ranks(config), config.train.micro_batches, config.pipeline.layout
    memory = _Memory.of(config, costs, stage_to_rank)
    name, slacks, is_squeezed = config.pipeline.schedule, SLACKS if effort >= 1 else _FEW_SLACKS, False
    if name == "planned":
        cuts = _cuts_with_room(costs, stage_to_rank, layout, slacks, memory, limit)
        caps = _activation_caps(config, costs, memory, budget)
        problem = Problem(
            costs=costs,
            stage_to_rank=stage_to_rank,
            micro_batches=micro_batches,
            message_seconds=message_seconds,
            activation_caps=lambda cut: caps(cut, limit),
            patterns=[
                pattern
                for pattern in _patterns(config)
                if micro_batch_problem(pattern, config.parallel.pp, micro_batches) is None
            ],
        )
        found = search(problem, cuts, move_units=layout == "auto", effort=effort)
        if found is None:
            assert limit is not None
            needed = _one_microbatch(costs, cuts[0], stage_to_rank)
            again = max(cost.recompute_bytes for cost in costs)
            raise memory.too_large(config, cuts[0], [one + again for one in needed], limit)
        cut, table, origin = found.partition, found.table, found.origin
        timeline = simulate(table, stage_costs(costs, cut), stage_to_rank, message_seconds)
        is_squeezed = any(
            cap < unlimited and peak + one > cap
            for cap, unlimited, peak, one in zip(
                caps(cut, limit),
                caps(cut, None),
                peak_activations(table, stage_costs(costs, cut)),
                _one_microbatch(costs, cut, stage_to_rank),
                strict=True,
            )
        )
    else:
        table, origin = schedules.build(name, config.parallel.pp, stage_to_rank, micro_batches), name
        bound = None if limit is None else memory.limit(limit, in_flight_combinations(table, stage_to_rank))
        limited = costs if limit is None else _at_worst(costs)
        cuts = partition_candidates(limited, stage_to_rank, layout, slacks, limit=bound)
        simulated = [(simulate(table, stage_costs(costs, cut), stage_to_rank, message_seconds), cut) for cut in cuts]
        fitting = [
            (timeline, cut)
            for timeline, cut in simulated
            if limit is None or memory.fits(cut, timeline.peak_activation_bytes, limit)
        ]
        timeline, cut = min(fitting or simulated, key=lambda pair: pair[0].step_time)
    if limit is not None and not memory.fits(cut, timeline.peak_activation_bytes, limit):
        raise memory.too_large(config, cut, timeline.peak_activation_bytes, limit)
    notes: tuple[str, ...] = ()
    if layout not in ("auto", "uniform"):
        notes = read_layout(layout, stage_to_rank, len(costs), config.mtp.depth)[1]
    return Choice(level, costs, cut, table, timeline, origin, limit, True, is_squeezed, notes)


def _patterns(config: Config) -> tuple[str, ...]:
    """Registered schedules that compete under ``planned``."""
    if config.pipeline.placement == "v":
        return ("zbv", "dualpipev")
    return ("1f1b",) if config.num_stages == config.parallel.pp else ("interleaved_1f1b",)


def _activation_caps(
    config: Config, costs: Sequence[UnitCost], memory: _Memory, budget: float
) -> Callable[[Partition, float | None], list[float]]:
    """Bytes of activations that each rank may hold under ``planned``, by partition and memory limit.

    At least one microbatch unless memory forbids it.
    """
    pp, in_flight = config.parallel.pp, config.pipeline.in_flight

    def caps(cut: Partition, limit: float | None) -> list[float]:
        stages, result = stage_costs(costs, cut), []
        least = _one_microbatch(costs, cut, memory.stage_to_rank)
        for rank in range(pp):
            own = [cost for cost, owner in zip(stages, memory.stage_to_rank, strict=True) if owner == rank]
            whole = sum(cost.activation_bytes for cost in own)
            cap = max(least[rank], budget if in_flight is None else in_flight * whole)
            if limit is not None:
                room = limit - memory.static(cut, rank) - max(cost.recompute_bytes for cost in own)
                cap = min(cap, room)
            result.append(cap)
        return result

    return caps


def _one_microbatch(costs: Sequence[UnitCost], cut: Partition, stage_to_rank: Sequence[int]) -> list[int]:
    """Bytes of activations that one microbatch needs on each rank, at most."""
    stages = stage_costs(costs, cut)
    owned = [
        [cost for cost, owner in zip(stages, stage_to_rank, strict=True) if owner == rank]
        for rank in range(max(stage_to_rank) + 1)
    ]
    return [
        sum(cost.activation_bytes for cost in own)
        + max(0, *(cost.deferred_bytes - cost.activation_bytes for cost in own))
        for own in owned
    ]


def _one_f_one_b_peak(costs: Sequence[UnitCost], config: Config) -> float:
    """Activations of the fullest rank under ``1f1b``: rank r holds min(P - r, M) microbatches."""
    num_ranks, micro_batches = config.parallel.pp, config.train.micro_batches
    stages = stage_costs(costs, partition(costs, tuple(range(num_ranks))))
    return max(min(num_ranks - rank, micro_batches) * cost.activation_bytes for rank, cost in enumerate(stages))


def _cuts_with_room(
    costs: Sequence[UnitCost],
    stage_to_rank: tuple[int, ...],
    layout: str,
    slacks: Sequence[float],
    memory: _Memory,
    limit: float | None,
) -> list[Partition]:
    """Partitions for ``planned`` to begin with: those that leave every rank memory for some microbatches.

    Half as many as there are ranks, if that fits; the least that any schedule needs is one.
    """
    if limit is None:
        return partition_candidates(costs, stage_to_rank, layout, slacks)
    num_ranks = max(stage_to_rank) + 1
    for in_flight in dict.fromkeys((max(1, num_ranks // 2), 1)):
        each = tuple((tuple(in_flight for owner in stage_to_rank if owner == rank),) for rank in range(num_ranks))
        try:
            return partition_candidates(
                _at_worst(costs), stage_to_rank, layout, slacks, limit=memory.limit(limit, each)
            )
        except DoesNotFit as error:
            failure = error
    raise failure


def _at_worst(costs: Sequence[UnitCost]) -> list[UnitCost]:
    """For the partition, which knows one number of activations: a microbatch holds the larger of the two."""
    return [
        dataclasses.replace(cost, activation_bytes=max(cost.activation_bytes, cost.deferred_bytes)) for cost in costs
    ]


@dataclass(frozen=True)
class _Memory:
    """What a rank holds whatever the schedule: weights, gradients and optimizer state."""

    stage_to_rank: tuple[int, ...]
    unit_bytes: tuple[float, ...]
    rank_bytes: tuple[float, ...]
    """Besides its units: the embedding's replica."""

    @staticmethod
    def of(config: Config, costs: Sequence[UnitCost], stage_to_rank: tuple[int, ...]) -> _Memory:
        replica = 0.0
        if embedding_has_two_copies(config, stage_to_rank):
            replica = _static_bytes(config, UnitCost(params=unit_parameters(config)[0]))
        last = stage_to_rank[-1]
        return _Memory(
            stage_to_rank,
            tuple(_static_bytes(config, cost) for cost in costs),
            tuple(replica if rank == last else 0.0 for rank in range(config.parallel.pp)),
        )

    def static(self, cut: Partition, rank: int) -> float:
        units = [unit for owner, units in zip(self.stage_to_rank, cut, strict=True) if owner == rank for unit in units]
        return self.rank_bytes[rank] + sum(self.unit_bytes[unit] for unit in units)

    def limit(self, num_bytes: float, in_flight: tuple[tuple[tuple[int, ...], ...], ...]) -> MemoryLimit:
        return MemoryLimit(num_bytes, self.unit_bytes, self.rank_bytes, in_flight)

    def fits(self, cut: Partition, peaks: Sequence[int], limit: float) -> bool:
        return all(self.static(cut, rank) + peak <= limit for rank, peak in enumerate(peaks))

    def too_large(self, config: Config, cut: Partition, peaks: Sequence[int], limit: float) -> DoesNotFit:
        held = [self.static(cut, rank) + peak for rank, peak in enumerate(peaks)]
        rank = max(range(len(held)), key=held.__getitem__)
        return DoesNotFit(
            f"pipeline rank {rank} needs {held[rank] / 1e9:.4g} GB and may have {limit / 1e9:.4g} GB "
            f"(pipeline.memory_gb, or nine tenths of the device's): {what_helps(config)}"
        )


def what_helps(config: Config) -> str:
    """Against too little memory."""
    recompute = "" if config.pipeline.recompute == "auto" else "set pipeline.recompute=auto, "
    return f"{recompute}raise parallel.pp or parallel.ep, lower train.micro_batch_size, or set optim.moment_dtype=bf16"


def _static_bytes(config: Config, cost: UnitCost) -> float:
    return float(rank_memory(config, 0, cost, 0).total_bytes)
