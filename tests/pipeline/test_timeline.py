"""Timelines from marks, and which steps have one."""

from __future__ import annotations

import json

import pytest
from pipeline.pipeline_cases import equal_stages, v_ranks

from dist_mtp.pipeline import schedules
from dist_mtp.pipeline.simulate import simulate
from dist_mtp.pipeline.timeline import MeasuredTimeline, from_marks, is_measured


def test_simulated_times_give_the_simulated_bubble() -> None:
    """Clocks that showed exactly the simulated times would have measured the plan's busy times, step time and bubble."""
    ranks = v_ranks(4)
    table = schedules.zbv(4, ranks, 9)
    predicted = simulate(table, equal_stages(len(ranks)), ranks)
    lines = [[event for event in predicted.events if event.rank == rank] for rank in range(4)]
    # Each rank waits for the message from the end of its previous action on.
    marks = [
        [(0.0 if i == 0 else line[i - 1].end, event.start, event.end) for i, event in enumerate(line)] for line in lines
    ]
    measured = from_marks(table, marks)
    assert [(e.rank, e.action, e.start, e.end) for e in measured.events] == [
        (e.rank, e.action, e.start, e.end) for e in predicted.events
    ]
    assert (measured.busy, measured.step_time, measured.bubble) == (
        predicted.busy,
        predicted.step_time,
        predicted.bubble,
    )
    assert MeasuredTimeline.from_json(json.loads(json.dumps(measured.to_json()))) == measured
    idle = [line[-1].end - busy for line, busy in zip(lines, predicted.busy, strict=True)]
    assert measured.waited == pytest.approx(idle), f"waited {measured.waited}, idle before the last action {idle}"


def test_stages_share_their_ranks_time() -> None:
    """The two stages of a rank under V placement add up to its busy share, and no stage is counted on another rank."""
    ranks = v_ranks(2)
    table = schedules.zbv(2, ranks, 4)
    predicted = simulate(table, equal_stages(4), ranks)
    marks = [[(e.start, e.start, e.end) for e in predicted.events if e.rank == rank] for rank in range(2)]
    shares = from_marks(table, marks).stage_busy_shares(4)
    busy = [seconds / predicted.step_time for seconds in predicted.busy]
    assert [shares[0] + shares[3], shares[1] + shares[2]] == pytest.approx(busy), f"{shares}, ranks {busy}"
    assert shares == pytest.approx([busy[0] / 2, busy[1] / 2, busy[1] / 2, busy[0] / 2]), shares


@pytest.mark.parametrize(
    ("every", "start", "expected"),
    [(0, 0, []), (1, 0, [*range(5, 13)]), (4, 0, [5, 9]), (100, 0, [5]), (4, 2, [7, 11]), (100, 96, [101])],
)
def test_measured_steps(every: int, start: int, expected: list[int]) -> None:
    """Steps count from the start of the process: after a resume, too, none of its first four is measured, and one soon is."""
    found = [step for step in range(start + 1, start + 13) if is_measured(step, every, start=start)]
    assert found == expected, f"every {every}: {found}"


@pytest.mark.parametrize(
    ("every", "statistics_every", "expected"),
    [(100, 10, [5, 105]), (100, 5, [6, 106]), (3, 2, [5, 9, 11, 15]), (1, 3, [5, 7, 8, 10, 11]), (100, 1, [5, 105])],
)
def test_measured_step_computes_no_statistics(every: int, statistics_every: int, expected: list[int]) -> None:
    """FP8 statistics take time that other steps do not need. Where every step has them, they are part of a usual one."""
    found = [step for step in range(1, 120) if is_measured(step, every, statistics_every=statistics_every)]
    assert found[: len(expected)] == expected, found
    statistics = {step for step in found if statistics_every > 1 and step % statistics_every == 0}
    assert not statistics, f"measured with statistics: {sorted(statistics)}"
