"""A measured step: when each action of a table did run. The counterpart of ``simulate``, from clocks instead of costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_mtp.pipeline.simulate import Event
from dist_mtp.pipeline.table import Action, Table

FIRST_STEP = 5
"""The first step of a process that is measured: the ones before it compile, allocate and connect."""


@dataclass(frozen=True, slots=True)
class MeasuredEvent(Event):
    """One action of one rank; times in seconds since all ranks began the step."""

    waited: float
    """Seconds before ``start`` in which the rank stood still for a message that the action needs."""


@dataclass(frozen=True)
class MeasuredTimeline:
    """The pipeline's part of one step, on the ranks of one data replica.

    With ``parallel.ep`` > 1 an action's time includes its waits for the all-to-all, so they count as busy: the bubble is
    smaller than the share of time in which nothing is computed.
    """

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

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> MeasuredTimeline:
        """Inverse of :meth:`to_json`.

        Raises:
            KeyError, TypeError, ValueError: not what it wrote.
        """
        ranks = content["ranks"]
        return MeasuredTimeline(
            events=tuple(
                MeasuredEvent(line["rank"], Action.parse(name), start, end, waited)
                for line in ranks
                for name, waited, start, end in line["actions"]
            ),
            step_time=content["step_time"],
            busy=tuple(line["busy"] for line in ranks),
            waited=tuple(line["waited"] for line in ranks),
        )


def is_measured(step: int, every: int, *, start: int = 0, statistics_every: int = 0) -> bool:
    """Whether a step has a timeline under ``monitor.timeline_every``; 0: none.

    It is the process's :data:`FIRST_STEP`-th step and every ``every``-th one after it. A step that also computes FP8
    statistics is no typical one: the measurement waits for the next. It is not the statistics that wait, as those must
    stand at the same steps in a resumed run.

    Args:
        start: the step after which this process began.
        statistics_every: ``precision.fp8_statistics_every``; 0: no statistics.

    >>> [step for step in range(1, 31) if is_measured(step, 10, statistics_every=5)]
    [6, 16, 26]
    """

    def is_due(step: int) -> bool:
        since = step - start - FIRST_STEP
        return since >= 0 and since % every == 0

    def is_typical(step: int) -> bool:
        return statistics_every <= 1 or step % statistics_every != 0

    return every > 0 and is_typical(step) and (is_due(step) or (is_due(step - 1) and not is_typical(step - 1)))


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
