"""Simulated timelines against closed formulas."""

from __future__ import annotations

import pytest
from pipeline.pipeline_cases import all_tables, equal_stages, v_ranks

from dist_mtp.pipeline import schedules
from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.pipeline.lowering import lower
from dist_mtp.pipeline.simulate import simulate
from dist_mtp.pipeline.table import Action, Kind


class TestTextbookBubbles:
    """Equal stages and free messages give the bubble that the schedule's paper states."""

    @pytest.mark.parametrize(("num_ranks", "micro_batches"), [(1, 3), (2, 2), (4, 4), (4, 9), (8, 32)])
    @pytest.mark.parametrize("name", ["1f1b", "gpipe"])
    def test_one_stage_per_rank(self, name: str, num_ranks: int, micro_batches: int) -> None:
        """(P - 1) / (M + P - 1), arXiv 2104.04473 section 2.2.1."""
        ranks = tuple(range(num_ranks))
        table = schedules.build(name, num_ranks, ranks, micro_batches)
        bubble = simulate(table, equal_stages(num_ranks), ranks).bubble
        expected = (num_ranks - 1) / (micro_batches + num_ranks - 1)
        assert bubble == pytest.approx(expected), f"{bubble} != {expected}"

    @pytest.mark.parametrize("stages_per_rank", [2, 3])
    def test_interleaved(self, stages_per_rank: int) -> None:
        """The ramp shrinks by the number of stages per rank v: (P - 1) / (v * M + P - 1), same source."""
        num_ranks, micro_batches = 4, 16
        ranks = tuple(range(num_ranks)) * stages_per_rank
        table = schedules.interleaved_1f1b(num_ranks, ranks, micro_batches)
        bubble = simulate(table, equal_stages(len(ranks)), ranks).bubble
        expected = (num_ranks - 1) / (stages_per_rank * micro_batches + num_ranks - 1)
        assert bubble == pytest.approx(expected), f"{bubble} != {expected}"

    @pytest.mark.parametrize(("num_ranks", "micro_batches"), [(2, 4), (4, 8), (8, 32), (6, 11)])
    def test_zbv(self, num_ranks: int, micro_batches: int) -> None:
        """No rank waits between its first and last action: (P - 1) / (6M + P - 1), arXiv 2401.10241 section 6."""
        ranks = v_ranks(num_ranks)
        timeline = simulate(schedules.zbv(num_ranks, ranks, micro_batches), equal_stages(len(ranks)), ranks)
        expected = (num_ranks - 1) / (6 * micro_batches + num_ranks - 1)
        assert timeline.bubble == pytest.approx(expected), f"{timeline.bubble} != {expected}"
        plain = (num_ranks - 1) / (micro_batches + num_ranks - 1)
        assert timeline.bubble < plain, f"zbv {timeline.bubble} is not below 1f1b {plain}"


def test_dependencies_hold_in_time() -> None:
    """No action starts before its inputs have ended and travelled, nor before the rank's previous action ended."""
    delay = 0.25
    for label, table, ranks, _ in all_tables(max_ranks=4, max_micro_batches=9):
        costs = [
            UnitCost(time_f=1 + s / 7, time_i=1.5 - s / 9, time_w=0.5, activation_bytes=1) for s in range(len(ranks))
        ]
        timeline = simulate(table, costs, ranks, delay)
        span = {event.action: (event.start, event.end) for event in timeline.events}
        ended = dict.fromkeys(ranks, 0.0)
        for event in timeline.events:
            action = event.action
            stage, m = action.stage, action.microbatch
            needed = {
                Kind.F: [Action(Kind.F, stage - 1, m)],
                Kind.W: [Action(Kind.I, stage, m)],
            }.get(action.kind, [Action(kind, stage + 1, m) for kind in (Kind.I, Kind.B)] + [Action(Kind.F, stage, m)])
            for source in needed:
                if source in span:
                    travel = delay if ranks[source.stage] != event.rank else 0.0
                    earliest = span[source][1] + travel
                    assert event.start >= earliest - 1e-9, (
                        f"{label}: {action} at {event.start}, {source} there at {earliest}"
                    )
            assert event.start >= ended[event.rank] - 1e-9, f"{label}: {action} overlaps its rank's previous action"
            ended[event.rank] = event.end
        assert timeline.step_time == pytest.approx(max(ended.values()))


def test_messages_delay_other_ranks_only() -> None:
    """One microbatch through a V of two ranks crosses four times; the tip of the V is local."""
    ranks = v_ranks(2)
    table = schedules.gpipe(2, ranks, 1)
    step_time = simulate(table, equal_stages(4), ranks, message_seconds=10.0).step_time
    assert step_time == pytest.approx(4 * 3 + 4 * 10), f"{step_time} != {4 * 3 + 4 * 10}"


def test_activations_live_until_the_backward_is_complete() -> None:
    """GPipe holds M microbatches, 1F1B P - r; a put-off W keeps what its I left."""
    costs = equal_stages(4)
    gpipe = simulate(schedules.gpipe(4, range(4), 6), costs, range(4)).peak_activation_bytes
    assert gpipe == (6, 6, 6, 6), gpipe
    one_f_one_b = simulate(schedules.one_f_one_b(4, range(4), 6), costs, range(4)).peak_activation_bytes
    assert one_f_one_b == (4, 3, 2, 1), one_f_one_b
    put_off = [Action(kind, 0, m) for kind, m in ((Kind.F, 0), (Kind.I, 0), (Kind.F, 1), (Kind.W, 0), (Kind.B, 1))]
    assert simulate((tuple(put_off),), equal_stages(1), (0,)).peak_activation_bytes == (2,)
    # 5 bytes from F to I, 2 from I to W, and 1 while something is computed again.
    stage = UnitCost(time_f=1, time_i=1, time_w=1, activation_bytes=5, deferred_bytes=2, recompute_bytes=1)
    assert simulate((tuple(put_off),), [stage], (0,)).peak_activation_bytes == (5 + 2 + 1,)


def test_lowered_tables_take_as_long() -> None:
    """Communication actions occupy nobody."""
    ranks = v_ranks(3)
    table = schedules.zbv(3, ranks, 5)
    lowered = lower(table, ranks, len(ranks))
    assert simulate(lowered, equal_stages(6), ranks, 0.1) == simulate(table, equal_stages(6), ranks, 0.1)


def test_stuck_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot progress"):
        simulate(((Action(Kind.B, 0, 0), Action(Kind.F, 0, 0)),), equal_stages(1), (0,))
