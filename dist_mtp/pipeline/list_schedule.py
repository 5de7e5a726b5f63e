"""List scheduling: a table that follows the costs of the stages, built by playing the step through.

The registered schedules are patterns made for equal stages. This one knows nothing but times and memory: whenever a rank is
free it runs one of the actions that are possible, chosen by a :class:`Policy`. What the policies differ in is how a step
begins and ends; in its middle every rank has more to do than time. ``planned`` searches among them.

No table of this module deadlocks, whatever times, caps and policy. A rank never waits for anything but a message that is
already on its way, and :func:`_may_start` keeps room for all that was started: microbatches that the rank has begun, less
those that have passed all of its stages, fit at once, with all that the oldest of them still needs. As microbatches pass
every stage in order, the oldest of all is the oldest on every rank, and what is older there is only waiting to be freed by
weight gradients, which nothing holds up. So there is always an action that is possible, until there is none left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.pipeline.table import Action, Kind, Table

Step = tuple[int, int, int]
"""An action as the searches write it: :data:`FORWARD`, :data:`INPUT` or :data:`WEIGHT`; stage; microbatch."""
FORWARD, INPUT, WEIGHT, NOTHING = range(4)
_KINDS = (Kind.F, Kind.I, Kind.W)
_NEVER = float("inf")


@dataclass(frozen=True)
class Policy:
    """How a rank chooses among the actions that it could run now.

    Input gradients come first, then forwards, of both the rank's later stages before its earlier ones; weight gradients run
    when there is nothing else, or when memory is needed. The fields say where to deviate from that.
    """

    kept_room: float = 1.0
    """Microbatches for which rank 0 keeps room on its later stages when it starts one on an earlier stage. Without, the first
    stage would fill the memory and its own microbatches would find none on their way back."""
    kept_room_per_rank: float = 1.0
    """The same, more for each further rank: microbatches come back up to rank r the earlier, the larger r."""
    forward_patience: float = 1.0
    """While the pipeline fills, a forward does not start if a more urgent action becomes possible before this share of it has
    run. Time is not short then, and every delay of the first microbatch delays all ranks."""
    filling: int = 1
    """The pipeline fills until the rank's first stage has run this many input gradients."""
    weight_patience: float = 0.15
    """A weight gradient does not start if another action becomes possible before this share of it has run."""
    drain_patience: float = 0.6
    """The same once the rank has no forward left: then the last microbatches' way back decides the end of the step."""
    draining: int | None = None
    """Forwards come before input gradients once this many are left to the rank's first stage. None: never."""


@dataclass(frozen=True)
class ListSchedule:
    """A schedule with its simulated time and memory."""

    lines: tuple[tuple[Step, ...], ...]
    """Of each rank, in order."""
    step_time: float
    """Seconds."""
    peak_activation_bytes: tuple[int, ...]
    """Per rank."""
    period: float
    """Seconds from one microbatch to the next in the second half of the step; see :func:`period_of`."""

    def table(self) -> Table:
        return tuple(
            tuple(Action(_KINDS[kind], stage, microbatch) for kind, stage, microbatch in line) for line in self.lines
        )


def list_schedule(
    stage_costs: Sequence[UnitCost],
    stage_to_rank: Sequence[int],
    micro_batches: int,
    activation_caps: Sequence[float],
    message_seconds: float = 0.0,
    policy: Policy = Policy(),
) -> ListSchedule:
    """Schedule a step.

    Args:
        stage_costs: per stage and microbatch.
        stage_to_rank: rank of each stage; any placement.
        micro_batches: M, at least 1.
        activation_caps: bytes of saved activations that each rank may hold. One microbatch must fit.
        message_seconds: from the end of an action until another rank can use its result.

    Raises:
        ValueError: a rank's cap is less than one microbatch may need.
    """
    num_stages, num_ranks = len(stage_costs), max(stage_to_rank) + 1
    time_f = [cost.time_f for cost in stage_costs]
    time_i = [cost.time_i for cost in stage_costs]
    time_w = [cost.time_w for cost in stage_costs]
    held = [cost.activation_bytes for cost in stage_costs]  # from F to I
    deferred = [cost.deferred_bytes for cost in stage_costs]  # from I to W
    stages = [[stage for stage in range(num_stages) if stage_to_rank[stage] == rank] for rank in range(num_ranks)]
    whole = [sum(held[stage] for stage in own) for own in stages]
    # Input gradients may need memory; forwards leave them enough for one.
    forward_caps = [
        cap - max(max(0, deferred[stage] - held[stage]) for stage in own)
        for cap, own in zip(activation_caps, stages, strict=True)
    ]
    for rank, cap in enumerate(forward_caps):
        if whole[rank] > cap:
            raise ValueError(f"one microbatch on rank {rank} exceeds its cap of {activation_caps[rank]:.3g} bytes")
    # Pending weight gradients that free most memory per second go first.
    freeing = [sorted(own, key=lambda stage: -deferred[stage] / max(time_w[stage], 1e-12)) for own in stages]
    later_first = [own[::-1] for own in stages]
    draining = -1 if policy.draining is None else policy.draining
    kept_room = [policy.kept_room + policy.kept_room_per_rank * rank for rank in range(num_ranks)]

    forwards, inputs, weights = [0] * num_stages, [0] * num_stages, [0] * num_stages  # done, or under way
    # When what F and I of a stage need is there, by microbatch; both come in order.
    forward_ready: list[list[float]] = [[] for _ in range(num_stages)]
    input_ready: list[list[float]] = [[] for _ in range(num_stages)]
    forward_ready[0] = [0.0] * micro_batches
    live, peak, free_at = [0] * num_ranks, [0] * num_ranks, [0.0] * num_ranks
    lines: list[list[Step]] = [[] for _ in range(num_ranks)]
    wakes = [(0.0, rank) for rank in range(num_ranks)]
    heapify(wakes)
    last, step_time = num_stages - 1, 0.0
    turns: list[float] = []  # when each microbatch's way back begins

    # Searches run this loop a hundred thousand times a second: hence plain comparisons and few calls.
    while wakes:
        now, rank = heappop(wakes)
        if now < free_at[rank]:
            continue
        own, held_now, cap = stages[rank], live[rank], forward_caps[rank]
        first, highest = own[0], own[-1]
        # When an action becomes possible: any, or one more urgent than a forward of the first stage.
        coming = urgent = _NEVER
        kind, stage = NOTHING, -1

        for candidate in later_first[rank]:
            count = inputs[candidate]
            if count < len(input_ready[candidate]):
                ready = input_ready[candidate][count]
                if ready > now:
                    if ready < urgent:
                        urgent = ready
                elif kind == NOTHING and held_now + deferred[candidate] - held[candidate] <= activation_caps[rank]:
                    kind, stage = INPUT, candidate
        coming = urgent
        forwards_first = micro_batches - forwards[first] <= draining
        if kind == NOTHING or forwards_first:
            for candidate in own if forwards_first else later_first[rank]:
                count = forwards[candidate]
                if count >= len(forward_ready[candidate]) or held_now + held[candidate] > cap:
                    continue
                # A microbatch that has passed all stages before may go on if it fits; others must leave room.
                if count > forwards[highest]:
                    room = cap - held_now - held[candidate]
                    if _kept_room(candidate, own, forwards, weights, held, kept_room[rank]) > room:
                        continue
                    if not _may_start(candidate, own, forwards, held, cap):
                        continue
                ready = forward_ready[candidate][count]
                if ready <= now:
                    kind, stage = FORWARD, candidate
                    break
                if ready < coming:
                    coming = ready
                if ready < urgent and candidate != first:
                    urgent = ready

        if kind == FORWARD:
            if urgent < now + policy.forward_patience * time_f[stage] and inputs[first] < policy.filling:
                kind, coming = NOTHING, urgent
        elif kind == NOTHING:
            # A weight gradient, unless something else comes soon.
            patience = policy.weight_patience if forwards[highest] < micro_batches else policy.drain_patience
            for candidate in freeing[rank]:
                if weights[candidate] < inputs[candidate]:
                    if coming >= now + patience * time_w[candidate]:
                        kind, stage = WEIGHT, candidate
                    break
        if kind == NOTHING:
            free_at[rank] = now
            if coming < _NEVER:
                heappush(wakes, (coming, rank))
            continue

        target = -1
        if kind == FORWARD:
            end = now + time_f[stage]
            lines[rank].append((FORWARD, stage, forwards[stage]))
            forwards[stage] += 1
            live[rank] = held_now + held[stage]
            target, ready_list = (stage + 1, forward_ready) if stage < last else (stage, input_ready)
        elif kind == INPUT:
            end = now + time_i[stage]
            lines[rank].append((INPUT, stage, inputs[stage]))
            inputs[stage] += 1
            if stage == last:
                turns.append(end)
            live[rank] = held_now + deferred[stage] - held[stage]
            target, ready_list = stage - 1, input_ready
        else:
            end = now + time_w[stage]
            lines[rank].append((WEIGHT, stage, weights[stage]))
            weights[stage] += 1
            live[rank] = held_now - deferred[stage]
        if live[rank] > peak[rank]:
            peak[rank] = live[rank]
        if target >= 0:
            peer = stage_to_rank[target]
            if peer == rank:
                ready_list[target].append(end)
            else:
                arrival = end + message_seconds
                ready_list[target].append(arrival)
                if free_at[peer] <= arrival:  # else the peer looks when it is free
                    heappush(wakes, (arrival, peer))
        free_at[rank] = end
        if end > step_time:
            step_time = end
        heappush(wakes, (end, rank))

    return ListSchedule(tuple(map(tuple, lines)), step_time, tuple(peak), period_of(turns))


def period_of(turns: Sequence[float]) -> float:
    """Mean time between microbatches in the second half, from when their input gradients of the last stage end."""
    half = len(turns) // 2
    return (turns[-1] - turns[half]) / (len(turns) - 1 - half) if len(turns) > 2 else 0.0


def _may_start(stage: int, own: Sequence[int], forwards: Sequence[int], held: Sequence[int], cap: float) -> bool:
    """Whether a rank still has room for all that it has begun if ``stage`` runs its next forward, not that of the oldest.

    Counted are the microbatches that have passed some, but not all, of the rank's stages, and what the oldest of them still
    has to store. Once that one has passed, its memory will be freed, and the next oldest needs no more than it.
    """
    oldest = forwards[own[-1]]
    begun = whole = 0
    for other in own:
        begun += held[other] * (forwards[other] + (other == stage) - oldest)
        whole += held[other] * (forwards[other] <= oldest)
    return begun + whole <= cap


def _kept_room(
    stage: int,
    own: Sequence[int],
    forwards: Sequence[int],
    weights: Sequence[int],
    held: Sequence[int],
    microbatches: float,
) -> float:
    """Bytes that a forward on ``stage`` leaves free by policy, so that the rank's later stages can hold ``microbatches``."""
    room = 0.0
    for other in own:
        missing = microbatches - (forwards[other] - weights[other])
        if other > stage and missing > 0:
            room += missing * held[other]
    return room
