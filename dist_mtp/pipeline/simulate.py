"""Simulation: when each action of a table would run, if every rank works as soon as it can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.pipeline.table import Action, Kind, Table


@dataclass(frozen=True, slots=True)
class Event:
    """One action of one rank; times in seconds from the start of the step."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step."""

    events: tuple[Event, ...]
    """Computation only; each rank's events in order."""
    step_time: float
    """Seconds from the first action's start to the last one's end."""
    busy: tuple[float, ...]
    """Seconds of computation, per rank."""
    peak_activation_bytes: tuple[int, ...]
    """Most bytes of saved activations at any time, per rank, and what exists besides while the unit that needs most recomputes:
    which backward is under way at the peak is left open."""

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait: 1 - busy / (ranks * step time)."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.step_time)


def simulate(
    table: Table, stage_costs: Sequence[UnitCost], stage_to_rank: Sequence[int], message_seconds: float = 0.0
) -> Timeline:
    """Play a table through with the given costs.

    A rank runs its actions in order, each as soon as its inputs are there: F after the previous stage's F, I and B
    after the next stage's I or B (the last stage's after its own F), W after its I. Inputs from another rank arrive
    ``message_seconds`` after they were computed; sending and receiving occupy nobody. A microbatch holds a stage's
    ``activation_bytes`` from the start of F to the end of I or B, and from there its ``deferred_bytes`` to the end of W.

    Args:
        table: lowered or not; communication actions are skipped.
        stage_costs: per stage and microbatch.
        stage_to_rank: rank of each stage.
        message_seconds: from the end of an action until another rank can use its result.

    Raises:
        ValueError: the table cannot progress.
    """
    last = len(stage_to_rank) - 1
    lines = [[action for action in actions if action.kind.is_compute] for actions in table]
    seconds = {
        kind: [_duration(kind, cost) for cost in stage_costs] for kind in (Kind.F, Kind.I, Kind.W, Kind.B)
    }  # kind -> per stage
    # When a stage's F and its I or B end, by microbatch. The loop below is what plans of large pipelines spend their time in.
    forward_end: list[dict[int, float]] = [{} for _ in stage_to_rank]
    input_end: list[dict[int, float]] = [{} for _ in stage_to_rank]
    events: list[list[Event]] = [[] for _ in lines]
    now = [0.0] * len(lines)

    progress = True
    while progress:
        progress = False
        for rank, line in enumerate(lines):
            done = events[rank]
            for action in line[len(done) :]:
                kind, stage, microbatch = action.kind, action.stage, action.microbatch
                ready: float | None = 0.0
                if kind is Kind.F:
                    source = stage - 1
                    if stage > 0:
                        ready = forward_end[source].get(microbatch)
                elif kind is Kind.W:
                    source = stage
                    ready = input_end[stage].get(microbatch)
                elif stage == last or microbatch not in forward_end[stage]:
                    source = stage
                    ready = forward_end[stage].get(microbatch)
                else:
                    source = stage + 1
                    ready = input_end[source].get(microbatch)
                if ready is None:
                    break
                if stage_to_rank[source] != rank and source >= 0:
                    ready += message_seconds
                start = max(now[rank], ready)
                end = start + seconds[kind][stage]
                if kind is Kind.F:
                    forward_end[stage][microbatch] = end
                elif kind is not Kind.W:
                    input_end[stage][microbatch] = end
                now[rank] = end
                done.append(Event(rank, action, start, end))
                progress = True
    if any(len(events[rank]) < len(line) for rank, line in enumerate(lines)):
        raise ValueError("the schedule cannot progress; lower() names the actions it is stuck at")

    return Timeline(
        events=tuple(event for line in events for event in line),
        step_time=max(now),
        busy=tuple(sum(seconds[action.kind][action.stage] for action in line) for line in lines),
        peak_activation_bytes=tuple(
            peak + max((stage_costs[action.stage].recompute_bytes for action in line), default=0)
            for peak, line in zip(peak_activations(table, stage_costs), lines, strict=True)
        ),
    )


def _duration(kind: Kind, cost: UnitCost) -> float:
    if kind is Kind.B:
        return cost.time_i + cost.time_w
    return {Kind.F: cost.time_f, Kind.I: cost.time_i, Kind.W: cost.time_w}[kind]


def peak_activations(table: Table, stage_costs: Sequence[UnitCost]) -> tuple[int, ...]:
    """Most bytes of saved activations on each rank, whatever the times; without what exists while a unit recomputes."""
    return tuple(_peak([action for action in line if action.kind.is_compute], stage_costs) for line in table)


def _peak(line: Sequence[Action], stage_costs: Sequence[UnitCost]) -> int:
    live = peak = 0
    for action in line:
        cost = stage_costs[action.stage]
        if action.kind is Kind.F:
            live += cost.activation_bytes
        elif action.kind is Kind.I:
            live += cost.deferred_bytes - cost.activation_bytes
        elif action.kind is Kind.W:
            live -= cost.deferred_bytes
        else:
            live -= cost.activation_bytes
        peak = max(peak, live)
    return peak
