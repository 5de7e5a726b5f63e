"""A measured step: when each action of a table did run. The counterpart of ``simulate``, from clocks instead of costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_mtp.pipeline.simulate import Event
from dist_mtp.pipeline.table import Table

FIRST_STEP = 5
"""The first step that is measured: the ones before it compile, allocate and connect."""


@dataclass(frozen=True, slots=True)
class MeasuredEvent(Event):
    """One action of one rank; times in seconds since all ranks began the step."""

    waited: float
    """Seconds before ``start`` in which the rank stood still for a message that the action needs."""


@dataclass(frozen=True)
class MeasuredTimeline:
    """The pipeline's part of one step, on the ranks of one data replica."""

    events: tuple[MeasuredEvent, ...]
    """Computation only; each rank's events in order."""
    step_time: float
    """Seconds from the ranks' common start to the last action's end."""
    busy: tuple[float, ...]
    """Seconds of computation, per rank."""
    waited: tuple[float, ...]
    """Seconds of waiting for messages, per rank. What is neither busy nor waited is left to the host: sending, Python,
    and the time after a rank's last action."""

    @property
    def bubble(self) -> float:
        """As the simulated one: 1 - busy / (ranks * step time)."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.step_time)

    def stage_busy_shares(self, num_stages: int) -> list[float]:
        """Share of the step in which each stage was computed; those of a rank's stages sum to its busy share."""
        seconds = [0.0] * num_stages
        for event in self.events:
            seconds[event.action.stage] += event.end - event.start
        return [busy / self.step_time for busy in seconds]

    def to_json(self) -> dict[str, Any]:
        """Times in seconds; an action is ``[name, waited, start, end]``, its name as in ``2I5``: I of microbatch 5 on stage 2."""
        ranks = [
            {
                "rank": rank,
                "busy": busy,
                "waited": waited,
                "actions": [[str(e.action), e.waited, e.start, e.end] for e in self.events if e.rank == rank],
            }
            for rank, (busy, waited) in enumerate(zip(self.busy, self.waited, strict=True))
        ]
        return {"step_time": self.step_time, "bubble": self.bubble, "ranks": ranks}


def is_measured(step: int, every: int) -> bool:
    """Whether a step has a timeline under ``monitor.timeline_every``: the fifth and every ``every``-th one; 0: none."""
    return every > 0 and (step == FIRST_STEP or step % every == 0)


def from_marks(table: Table, marks: Sequence[Sequence[Sequence[float]]]) -> MeasuredTimeline:
    """The timeline of what clocks said.

    Args:
        table: computation of each rank.
        marks: per rank and action of its table three times: before the wait for its input, and before and after its
            computation; seconds since the ranks' common start.
    """
    lines = [
        [
            MeasuredEvent(rank, action, start, end, waited=start - waiting_since)
            for action, (waiting_since, start, end) in zip(actions, times, strict=True)
        ]
        for rank, (actions, times) in enumerate(zip(table, marks, strict=True))
    ]
    return MeasuredTimeline(
        events=tuple(event for line in lines for event in line),
        step_time=max(line[-1].end for line in lines),
        busy=tuple(sum(event.end - event.start for event in line) for line in lines),
        waited=tuple(sum(event.waited for event in line) for line in lines),
    )
