"""Timelines from marks, and which steps have one."""

from __future__ import annotations

import pytest
from pipeline.pipeline_cases import equal_stages, v_ranks

from dist_mtp.pipeline import schedules
from dist_mtp.pipeline.simulate import simulate
from dist_mtp.pipeline.timeline import from_marks, is_measured


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


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, [*range(1, 13)]), (4, [4, 5, 8, 12]), (100, [5])])
def test_measured_steps(every: int, expected: list[int]) -> None:
    found = [step for step in range(1, 13) if is_measured(step, every)]
    assert found == expected, f"every {every}: {found}"
