"""Simulation: when each action of a table would run, if every rank works as soon as it can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.pipeline.lowering import inputs_ready
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
    """Most bytes of saved activations at any time, per rank."""

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
    ``message_seconds`` after they were computed; sending and receiving occupy nobody. Activations live from the start of
    F to the end of B or W: I frees nothing, as the weight gradients still need the saved inputs.

    Args:
        table: lowered or not; communication actions are skipped.
        stage_costs: per stage and microbatch.
        stage_to_rank: rank of each stage.
        message_seconds: from the end of an action until another rank can use its result.

    Raises:
        ValueError: the table cannot progress.
    """
    num_stages = len(stage_to_rank)
    lines = [[action for action in actions if action.kind.is_compute] for actions in table]
    events: list[list[Event]] = [[] for _ in lines]
    end: dict[Action, float] = {}

    progress = True
    while progress:
        progress = False
        for rank, line in enumerate(lines):
            while len(events[rank]) < len(line):
                action = line[len(events[rank])]
                if not inputs_ready(action, end, num_stages):
                    break
                start = events[rank][-1].end if events[rank] else 0.0
                source = _remote_input(action, end, stage_to_rank)
                if source is not None:
                    start = max(start, end[source] + message_seconds)
                end[action] = start + _duration(action, stage_costs[action.stage])
                events[rank].append(Event(rank, action, start, end[action]))
                progress = True
    if any(len(events[rank]) < len(line) for rank, line in enumerate(lines)):
        raise ValueError("the schedule cannot progress; lower() names the actions it is stuck at")

    return Timeline(
        events=tuple(event for line in events for event in line),
        step_time=max(line[-1].end for line in events),
        busy=tuple(sum(event.end - event.start for event in line) for line in events),
        peak_activation_bytes=tuple(_peak_activations(line, stage_costs) for line in lines),
    )


def _remote_input(action: Action, end: dict[Action, float], stage_to_rank: Sequence[int]) -> Action | None:
    """The action of another rank whose result ``action`` needs, if any."""
    if action.kind is Kind.W:
        return None
    step = -1 if action.kind is Kind.F else 1
    neighbour = action.stage + step
    if not 0 <= neighbour < len(stage_to_rank) or stage_to_rank[neighbour] == stage_to_rank[action.stage]:
        return None
    kinds = (Kind.F,) if action.kind is Kind.F else (Kind.I, Kind.B)
    sources = (Action(kind, neighbour, action.microbatch) for kind in kinds)
    return next(source for source in sources if source in end)


def _duration(action: Action, cost: UnitCost) -> float:
    if action.kind is Kind.B:
        return cost.time_i + cost.time_w
    return {Kind.F: cost.time_f, Kind.I: cost.time_i, Kind.W: cost.time_w}[action.kind]


def _peak_activations(line: Sequence[Action], stage_costs: Sequence[UnitCost]) -> int:
    live = peak = 0
    for action in line:
        if action.kind is Kind.F:
            live += stage_costs[action.stage].activation_bytes
            peak = max(peak, live)
        elif action.kind in (Kind.W, Kind.B):
            live -= stage_costs[action.stage].activation_bytes
    return peak
