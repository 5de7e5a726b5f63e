"""``planned``: list scheduling, weight filling, and the search over both."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Sequence

import pytest
from pipeline.pipeline_cases import equal_stages, tiny_config, v3_config, v_ranks

from dist_mtp.pipeline import choice, planned, schedules
from dist_mtp.pipeline.comparison import compare
from dist_mtp.pipeline.costs import UnitCost, total_cost
from dist_mtp.pipeline.list_schedule import Policy, list_schedule
from dist_mtp.pipeline.lowering import lower
from dist_mtp.pipeline.memory_limit import DoesNotFit
from dist_mtp.pipeline.partition import partition_candidates
from dist_mtp.pipeline.plan import make_plan
from dist_mtp.pipeline.planned import Problem, moved_units, search
from dist_mtp.pipeline.simulate import simulate
from dist_mtp.pipeline.table import check_complete
from dist_mtp.pipeline.weight_filling import fill_weights, forward_and_input_order


def _random_stages(rng: random.Random, count: int) -> list[UnitCost]:
    """Unequal in everything; some free, some that hold more after their input gradient than before."""
    return [
        UnitCost(
            time_f=rng.choice((0.0, rng.uniform(0.1, 5))),
            time_i=rng.uniform(0.0, 5),
            time_w=rng.choice((0.0, rng.uniform(0.1, 5))),
            activation_bytes=rng.randint(0, 20),
            deferred_bytes=rng.randint(0, 20),
        )
        for _ in range(count)
    ]


def _random_policy(rng: random.Random) -> Policy:
    return Policy(
        kept_room=rng.choice((0.0, 0.5, 3.0)),
        kept_room_per_rank=rng.choice((0.0, 1.0)),
        forward_patience=rng.choice((0.0, 1.0, 5.0)),
        filling=rng.choice((0, 1, 4)),
        weight_patience=rng.choice((0.0, 1.0, 5.0)),
        drain_patience=rng.choice((0.0, 1.0, 5.0)),
        draining=rng.choice((None, 0, 3)),
    )


def _least_caps(stages: Sequence[UnitCost], ranks: Sequence[int]) -> list[int]:
    """What one microbatch may need on each rank."""
    own = [[c for c, owner in zip(stages, ranks, strict=True) if owner == rank] for rank in range(max(ranks) + 1)]
    return [
        sum(c.activation_bytes for c in costs) + max(max(0, c.deferred_bytes - c.activation_bytes) for c in costs)
        for costs in own
    ]


class TestListSchedule:
    """Whatever costs, caps and policy: every action once, no deadlock, caps kept, times as the simulator's."""

    def test_random_problems(self) -> None:
        rng = random.Random(0)
        for _ in range(600):
            num_ranks, micro_batches = rng.randint(1, 5), rng.randint(1, 9)
            ranks = rng.choice((v_ranks(num_ranks), tuple(range(num_ranks)), tuple(range(num_ranks)) * 3))
            stages = _random_stages(rng, len(ranks))
            caps = [cap + rng.choice((0, 0, rng.randint(0, 60))) for cap in _least_caps(stages, ranks)]
            hop = rng.choice((0.0, 0.7))
            policy = _random_policy(rng)
            found = list_schedule(stages, ranks, micro_batches, caps, hop, policy)
            what = f"ranks {ranks}, M={micro_batches}, caps {caps}, {policy}"
            check_complete(found.table(), len(ranks), micro_batches, ranks)
            lower(found.table(), ranks, len(ranks))
            timeline = simulate(found.table(), stages, ranks, hop)
            assert all(peak <= cap for peak, cap in zip(found.peak_activation_bytes, caps, strict=True)), what
            assert timeline.peak_activation_bytes == found.peak_activation_bytes, what
            # The simulator never waits by choice, so it may be faster, never slower.
            assert timeline.step_time <= found.step_time + 1e-9, what

    def test_too_small_a_cap_is_refused(self) -> None:
        with pytest.raises(ValueError, match="rank 1"):
            list_schedule(equal_stages(4), v_ranks(2), 3, [2, 1])

    def test_equal_stages_leave_hardly_a_bubble(self) -> None:
        """With F = I = W and 1F1B's memory, V placement needs no more than its ramp: P - 1 of 6M + P - 1."""
        num_ranks, micro_batches = 4, 16
        found = list_schedule(equal_stages(8), v_ranks(4), micro_batches, [2 * num_ranks] * num_ranks)
        least = 6 * micro_batches + num_ranks - 1
        assert found.step_time <= least + 2, f"{found.step_time} where {least} is possible"


class TestWeightFilling:
    """The pattern's order of F and I stays; weight gradients move into its gaps, within the caps."""

    def test_order_stays_and_steps_get_shorter(self) -> None:
        rng, ratios = random.Random(1), []
        for _ in range(60):
            num_ranks, micro_batches = rng.randint(1, 4), rng.randint(1, 9)
            ranks = v_ranks(num_ranks)
            stages = [
                dataclasses.replace(c, deferred_bytes=c.activation_bytes) for c in _random_stages(rng, len(ranks))
            ]
            table = schedules.zbv(num_ranks, ranks, micro_batches)
            order = forward_and_input_order(table)
            before = simulate(table, stages, ranks, 0.3)
            found = fill_weights(order, stages, ranks, micro_batches, [10**6] * num_ranks, 0.3)
            assert found is not None
            check_complete(found.table(), len(ranks), micro_batches, ranks)
            assert forward_and_input_order(found.table()) == order
            assert found.step_time == pytest.approx(simulate(found.table(), stages, ranks, 0.3).step_time)
            ratios.append(found.step_time / before.step_time)
        assert statistics.mean(ratios) < 0.99, f"{statistics.mean(ratios):.3f} of the pattern's time"

    def test_caps(self) -> None:
        """What zbv holds suffices, with W early enough; less does not."""
        ranks, order = v_ranks(3), forward_and_input_order(schedules.zbv(3, v_ranks(3), 9))
        found = fill_weights(order, equal_stages(6), ranks, 9, [6, 6, 6])
        assert found is not None
        assert max(found.peak_activation_bytes) == 6
        assert fill_weights(order, equal_stages(6), ranks, 9, [5, 5, 5]) is None


class TestSearch:
    """The winner keeps the caps, is as fast as it says, and is no slower than what competes."""

    def test_beats_every_candidate(self) -> None:
        costs = [UnitCost(f, f, f, 1, 2, deferred_bytes=2) for f in (0.1, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 5)]
        ranks, micro_batches = v_ranks(3), 8
        cuts = partition_candidates(costs, ranks, "auto", (0.0, 0.1))
        problem = Problem(costs, ranks, micro_batches, 0.1, lambda cut: [30.0] * 3, ("zbv", "dualpipev"))
        found = search(problem, cuts)
        assert found is not None
        stages = [total_cost(costs[unit] for unit in units) for units in found.partition]
        timeline = simulate(found.table, stages, ranks, 0.1)
        check_complete(found.table, len(ranks), micro_batches, ranks)
        assert timeline.step_time == pytest.approx(found.step_time)
        assert max(timeline.peak_activation_bytes) <= 30
        for cut in cuts:
            stages = [total_cost(costs[unit] for unit in units) for units in cut]
            for name in problem.patterns:
                pattern = simulate(schedules.build(name, 3, ranks, micro_batches), stages, ranks, 0.1)
                if max(pattern.peak_activation_bytes) <= 30:
                    assert found.step_time <= pattern.step_time + 1e-9, f"{name} takes {pattern.step_time}"
        assert search(problem, cuts) == found, "two searches differ"

    def test_nothing_fits(self) -> None:
        costs = [UnitCost(1, 1, 1, 1, 2, deferred_bytes=2) for _ in range(6)]
        cuts = partition_candidates(costs, v_ranks(2), "auto", (0.0,))
        assert search(Problem(costs, v_ranks(2), 4, 0.0, lambda cut: [1.0, 1.0], ("zbv",)), cuts) is None

    def test_recipes_are_tried_on_the_whole_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Trials have fewer microbatches; the plan has all."""
        monkeypatch.setattr(planned, "_EFFORT", 2_000)
        costs = [UnitCost(1, 1, 1, 1, 2, deferred_bytes=2) for _ in range(8)]
        cuts = partition_candidates(costs, v_ranks(2), "auto", (0.0,))
        problem = Problem(costs, v_ranks(2), 40, 0.0, lambda cut: [20.0, 20.0], ("zbv",))
        assert problem.trial_micro_batches == 8
        found = search(problem, cuts)
        assert found is not None
        check_complete(found.table, 4, 40, v_ranks(2))


class TestDeepSeekV3:
    """With D=1 on 8 ranks, at no more than 1.1 times 1F1B's activations, ``planned`` leaves at most 6 % of the time idle."""

    def test_bubble_at_equal_memory(self) -> None:
        line = make_plan(v3_config(pp=8, micro_batches=32, placement="last", schedule="1f1b", memory_gb=1e4))
        plan = make_plan(v3_config(pp=8, micro_batches=32, memory_gb=1e4))
        peak, most = max(plan.timeline.peak_activation_bytes), max(line.timeline.peak_activation_bytes)
        assert plan.schedule == "planned"
        assert plan.timeline.bubble <= 0.06, f"{plan.timeline.bubble:.3f}"
        assert peak <= 1.1 * most, f"{peak / 1e9:.1f} GB, 1F1B {most / 1e9:.1f} GB"


class TestMemory:
    """A plan keeps ``pipeline.memory_gb``, recomputes under ``auto`` what that takes, and is refused where nothing helps."""

    @staticmethod
    def _config(memory_gb: float | None, **pipeline: object) -> object:
        config = tiny_config(2, depth=1)
        return dataclasses.replace(
            config,
            pipeline=dataclasses.replace(config.pipeline, memory_gb=memory_gb, **pipeline),  # type: ignore[arg-type]
        )

    def test_auto_recomputes_only_what_it_must(self) -> None:
        free = make_plan(self._config(None))  # type: ignore[arg-type]
        needs = max(rank.total_bytes for rank in free.ranks) / 1e9
        assert str(free.recompute) == "none"
        assert free.memory_limit is None
        plenty = make_plan(self._config(2 * needs))  # type: ignore[arg-type]
        assert str(plenty.recompute) == "none"
        assert plenty.table == free.table
        one = dataclasses.replace(free.ranks[0], activation_bytes=0).total_bytes / 1e9
        tight = one + 0.5 * (needs - one)
        little = make_plan(self._config(tight))  # type: ignore[arg-type]
        assert max(rank.total_bytes for rank in little.ranks) <= tight * 1e9
        assert str(little.recompute) != "none"

    def test_auto_fits_wherever_a_level_does(self) -> None:
        """Whole units need most at once, so what needs least depends on how many microbatches are held."""
        for memory_gb in (0.0285, 0.03, 0.034, 0.04):
            fits = []
            for recompute in ("none", "norms+swiglu", "full", "auto"):
                try:
                    make_plan(self._config(memory_gb, recompute=recompute))  # type: ignore[arg-type]
                except DoesNotFit:
                    continue
                fits.append(recompute)
            assert not fits or "auto" in fits, f"{memory_gb} GB: {fits}"

    def test_refused_with_numbers(self) -> None:
        with pytest.raises(DoesNotFit, match=r"rank \d needs 0\.\d+ GB.* may have 0\.001 GB"):
            make_plan(self._config(1e-3))  # type: ignore[arg-type]

    def test_in_flight(self) -> None:
        """One microbatch at a time is slow, and holds least."""
        free, one = make_plan(self._config(None)), make_plan(self._config(None, in_flight=1.0))  # type: ignore[arg-type]
        assert max(one.timeline.peak_activation_bytes) < max(free.timeline.peak_activation_bytes)
        assert one.timeline.step_time > free.timeline.step_time


class TestMovedUnits:
    """Neighbours of a partition: inner stages may become empty, both ends and ranks may not."""

    def test_reaches_empty_stages_but_no_empty_rank(self) -> None:
        moved = {tuple(len(units) for units in cut) for cut in moved_units(((0, 1), (2,), (3,), (4, 5)), v_ranks(2))}
        assert (2, 0, 2, 2) in moved, moved
        assert (3, 1, 0, 2) in moved, moved
        assert all(counts[0] > 0 and counts[3] > 0 and sum(counts) == 6 for counts in moved), moved
        assert all(counts[1] + counts[2] > 0 for counts in moved), moved
        alone = {tuple(len(units) for units in cut) for cut in moved_units(((0, 1), (2,), (), (3,)), v_ranks(2))}
        assert all(counts[1] + counts[2] > 0 for counts in alone), alone


class TestComparison:
    """Rows say what a plan under that placement and schedule would."""

    def test_every_row_is_that_plan(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choice, "_FEW_SLACKS", choice.SLACKS)
        config = tiny_config(2)
        plan = make_plan(config)
        rows = compare(config, plan)
        assert {(row.placement, row.schedule) for row in rows} == {
            *(("v", name) for name in ("planned", "zbv", "dualpipev", "gpipe")),
            *(("last", name) for name in ("planned", "1f1b", "interleaved_1f1b", "gpipe")),
        }
        times = [row.step_time for row in rows if row.step_time is not None]
        assert times == sorted(times), times
        for row in rows:
            if row.schedule == "planned":
                continue  # searched with less effort
            same = make_plan(tiny_config(2, placement=row.placement, schedule=row.schedule))
            assert row.memory_bytes == max(rank.total_bytes for rank in same.ranks), row
            assert row.step_time == pytest.approx(same.timeline.step_time), row

    def test_says_what_does_not_run(self) -> None:
        config = tiny_config(4, micro_batches=2)
        problems = {row.schedule: row.problem for row in compare(config, make_plan(config)) if row.problem}
        assert "train.micro_batches" in (problems.get("dualpipev") or ""), problems
