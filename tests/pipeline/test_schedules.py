"""Tables of computation: complete, and in the order of the schedules they are named after."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
from pipeline.pipeline_cases import all_tables, v_ranks
from torch.distributed.pipelining import schedules as torch_schedules

from dist_mtp.pipeline import schedules
from dist_mtp.pipeline.table import Action, Kind, Table, check_complete


def torch_order(name: str, num_ranks: int, num_stages: int, micro_batches: int) -> list[list[str]]:
    """Computation per rank of torch's schedule, which builds its order without any process."""
    stage = MagicMock(group_size=num_ranks, num_stages=num_stages, group_rank=0, stage_index=0)
    stage.submod = None
    schedule_class = torch_schedules.get_schedule_class(name)
    if issubclass(schedule_class, torch_schedules.PipelineScheduleMulti):
        order = schedule_class([stage] * (num_stages // num_ranks), micro_batches).pipeline_order
    else:
        order = schedule_class(stage, micro_batches)._get_pipeline_order()
    kinds = {kind.value for kind in Kind}
    return [
        [
            f"{part.stage_index}{part.computation_type.value}{part.microbatch_index}"
            for action in order[rank]
            if action is not None
            for part in (action.sub_actions or (action,))  # an overlapped pair
            if part.computation_type.value in kinds
        ]
        for rank in range(num_ranks)
    ]


def shorthand(table: Table) -> list[list[str]]:
    return [[str(action) for action in actions] for actions in table]


class TestSameOrderAsTorch:
    """Ours and torch 2.13's schedules of one name list the same actions in the same order on every rank."""

    @pytest.mark.parametrize("num_ranks", range(1, 8))
    def test_zbv(self, num_ranks: int) -> None:
        for micro_batches in (1, 2, 3, 5, 2 * num_ranks - 1, 2 * num_ranks, 4 * num_ranks + 1):
            ours = shorthand(schedules.zbv(num_ranks, v_ranks(num_ranks), micro_batches))
            torchs = torch_order("ZBVZeroBubble", num_ranks, 2 * num_ranks, micro_batches)
            assert ours == torchs, f"M={micro_batches}: ours {ours}, torch's {torchs}"

    @pytest.mark.parametrize("num_ranks", range(1, 8))
    def test_dualpipev(self, num_ranks: int) -> None:
        for micro_batches in (2 * num_ranks, 2 * num_ranks + 1, 4 * num_ranks + 3):
            ours = shorthand(schedules.dualpipev(num_ranks, v_ranks(num_ranks), micro_batches))
            torchs = torch_order("DualPipeV", num_ranks, 2 * num_ranks, micro_batches)
            assert ours == torchs, f"M={micro_batches}: ours {ours}, torch's {torchs}"

    @pytest.mark.parametrize("num_ranks", range(1, 8))
    @pytest.mark.parametrize("stages_per_rank", [1, 2, 3])
    def test_interleaved_1f1b(self, num_ranks: int, stages_per_rank: int) -> None:
        ranks = tuple(range(num_ranks)) * stages_per_rank
        for micro_batches in {max(1, num_ranks - 1), num_ranks, num_ranks + 1, 2 * num_ranks, 5 * num_ranks}:
            if micro_batches % max(1, micro_batches // num_ranks):
                continue
            ours = shorthand(schedules.interleaved_1f1b(num_ranks, ranks, micro_batches))
            torchs = torch_order("Interleaved1F1B", num_ranks, len(ranks), micro_batches)
            assert ours == torchs, f"M={micro_batches}: ours {ours}, torch's {torchs}"

    @pytest.mark.parametrize("num_ranks", range(1, 8))
    def test_1f1b(self, num_ranks: int) -> None:
        """torch numbers the last rank's forwards from 1 (2.13, ``Schedule1F1B._get_pipeline_order``): corrected here."""
        for micro_batches in (num_ranks, num_ranks + 1, 3 * num_ranks + 2):
            ours = shorthand(schedules.one_f_one_b(num_ranks, tuple(range(num_ranks)), micro_batches))
            torchs = torch_order("1F1B", num_ranks, num_ranks, micro_batches)
            last = num_ranks - 1
            torchs[last] = [text for m in range(micro_batches) for text in (f"{last}F{m}", f"{last}B{m}")]
            assert ours == torchs, f"M={micro_batches}: ours {ours}, torch's {torchs}"


class TestComplete:
    """Each stage runs F once per microbatch and its backward once, on its own rank, for every P and M allowed."""

    def test_every_schedule(self) -> None:
        for label, table, ranks, micro_batches in all_tables(max_ranks=6, max_micro_batches=13):
            try:
                check_complete(table, len(ranks), micro_batches, ranks)
            except ValueError as error:
                pytest.fail(f"{label}: {error}")

    @pytest.mark.parametrize(
        "actions",
        [
            [Action(Kind.F, 0, 0)],
            [Action(Kind.F, 0, 0), Action(Kind.I, 0, 0)],
            [Action(Kind.F, 0, 0), Action(Kind.F, 0, 0), Action(Kind.B, 0, 0)],
            [Action(Kind.F, 0, 0), Action(Kind.B, 0, 0), Action(Kind.W, 0, 0)],
            [Action(Kind.F, 0, 0), Action(Kind.B, 0, 0), Action(Kind.F, 0, 1)],
        ],
    )
    def test_faults_are_found(self, actions: list[Action]) -> None:
        """A missing, doubled, half or superfluous action is refused."""
        with pytest.raises(ValueError, match="stage"):
            check_complete((tuple(actions),), 1, 1)

    def test_wrong_rank_is_found(self) -> None:
        table = ((Action(Kind.F, 0, 0), Action(Kind.B, 0, 0)), ())
        check_complete(table, 1, 1, (0,))
        with pytest.raises(ValueError, match="belongs to rank 1"):
            check_complete(table, 1, 1, (1,))
        split = ((Action(Kind.F, 0, 0),), (Action(Kind.B, 0, 0),))
        with pytest.raises(ValueError, match="belongs to rank 0"):
            check_complete(split, 1, 1)


class TestMemory:
    """1F1B on rank r never holds more than P - r microbatches."""

    def test_microbatches_in_flight(self) -> None:
        for rank, actions in enumerate(schedules.one_f_one_b(4, range(4), 12)):
            live = peak = 0
            for action in actions:
                live += 1 if action.kind is Kind.F else -1
                peak = max(peak, live)
            assert peak == 4 - rank, f"rank {rank} holds {peak} microbatches, expected {4 - rank}"


def test_forward_only_has_every_forward_once() -> None:
    """An evaluation runs each microbatch through each stage once, and nothing else."""
    for ranks, num_ranks in ((v_ranks(3), 3), ((0, 1, 2) * 2, 3), ((0,), 1), (v_ranks(1), 1)):
        for micro_batches in (1, 2, 7):
            table = schedules.forward_only(num_ranks, ranks, micro_batches)
            found = sorted((a.stage, a.microbatch) for actions in table for a in actions if a.kind is Kind.F)
            expected = [(stage, m) for stage in range(len(ranks)) for m in range(micro_batches)]
            assert found == expected, f"{ranks}: {found} != {expected}"
            assert sum(map(len, table)) == len(expected), f"{table} holds more than forwards"


def test_schedules_refuse_microbatches_they_cannot_cut() -> None:
    with pytest.raises(ValueError, match="7 microbatches are fewer than the 8 stages"):
        schedules.dualpipev(4, v_ranks(4), 7)
    with pytest.raises(ValueError, match="5 microbatches do not divide into 2 rounds"):
        schedules.interleaved_1f1b(2, (0, 1, 0, 1), 5)
