"""Communication that is added to tables: complete, paired, ordered and free of deadlock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest
from pipeline.pipeline_cases import all_tables, v_ranks

from dist_mtp.pipeline import schedules
from dist_mtp.pipeline.lowering import lower
from dist_mtp.pipeline.table import Action, Kind, Table

SENDS = {Kind.SEND_F: (1, Kind.RECV_F), Kind.SEND_B: (-1, Kind.RECV_B)}
RECEIVES = {Kind.RECV_F: (-1, Kind.SEND_F), Kind.RECV_B: (1, Kind.SEND_B)}


def lowered_tables() -> Iterator[tuple[str, Table, Table, tuple[int, ...]]]:
    """(label, table, lowered table, rank of each stage), training and evaluation."""
    for label, table, ranks, _ in all_tables(max_ranks=6, max_micro_batches=13):
        yield label, table, lower(table, ranks, len(ranks)), ranks
    for num_ranks in range(1, 7):
        for ranks in (v_ranks(num_ranks), tuple(range(num_ranks)), tuple(range(num_ranks)) * 3):
            for micro_batches in (1, 2, 5, 13):
                table = schedules.forward_only(num_ranks, ranks, micro_batches)
                yield f"forward_only, {ranks}, M={micro_batches}", table, lower(table, ranks, len(ranks)), ranks


def peer_of(action: Action, ranks: Sequence[int]) -> int:
    step, _ = (SENDS | RECEIVES)[action.kind]
    return ranks[action.stage + step]


def counterpart(action: Action) -> Action:
    """The receive of a send and the reverse."""
    step, kind = (SENDS | RECEIVES)[action.kind]
    return Action(kind, action.stage + step, action.microbatch)


def run(table: Table, ranks: Sequence[int]) -> list[str]:
    """Execute a lowered table as ranks would; returns what is stuck.

    The strictest of channels: one queue per pair of ranks and direction, sends that wait for the receiver to arrive at
    the matching receive (rendezvous), receives that must match the head of the queue, and computation that needs its
    input to have been received before.
    """
    position = [0] * len(table)
    there: set[Action] = set()
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(table):
            if position[rank] == len(actions):
                continue
            action = actions[position[rank]]
            if action.kind in SENDS:
                peer = peer_of(action, ranks)
                if position[peer] == len(table[peer]) or table[peer][position[peer]] != counterpart(action):
                    continue
                there.add(counterpart(action))
                position[peer] += 1
            elif action.kind in RECEIVES or not inputs_are_here(action, ranks, there):
                continue  # the sender moves both ends on
            there.add(action)
            position[rank] += 1
            progress = True
    return [f"rank {r} at {a[position[r]]}" for r, a in enumerate(table) if position[r] < len(a)]


def inputs_are_here(action: Action, ranks: Sequence[int], there: set[Action]) -> bool:
    """Written from the runtime's point of view: a neighbour on another rank counts only once it was received."""
    stage, m = action.stage, action.microbatch
    if action.kind is Kind.W:
        return Action(Kind.I, stage, m) in there
    neighbour = stage - 1 if action.kind is Kind.F else stage + 1
    if not 0 <= neighbour < len(ranks):
        return True
    if ranks[neighbour] != ranks[stage]:
        return Action(Kind.RECV_F if action.kind is Kind.F else Kind.RECV_B, stage, m) in there
    kinds = (Kind.F,) if action.kind is Kind.F else (Kind.I, Kind.B)
    return any(Action(kind, neighbour, m) in there for kind in kinds)


def test_no_deadlock_even_with_blocking_sends_and_receives() -> None:
    """Every schedule and evaluation runs to its end for all P and M; a breach would name the stuck actions."""
    for label, _, lowered, ranks in lowered_tables():
        stuck = run(lowered, ranks)
        assert not stuck, f"{label}: {stuck}"


def test_computation_is_unchanged() -> None:
    """Lowering only adds: without communication each rank's list is the one it came from."""
    for label, table, lowered, _ in lowered_tables():
        for rank, actions in enumerate(lowered):
            computed = tuple(action for action in actions if action.kind.is_compute)
            assert computed == table[rank], f"{label}, rank {rank}: {computed} != {table[rank]}"


def test_pairs_of_ranks_agree_on_the_order() -> None:
    """What a sends to b is what b receives from a, in order, and both see all their messages in one order."""
    for label, _, lowered, ranks in lowered_tables():
        messages: dict[tuple[int, int], list[Action]] = defaultdict(list)
        for rank, actions in enumerate(lowered):
            for action in actions:
                if not action.kind.is_compute:
                    messages[rank, peer_of(action, ranks)].append(action)
        for (rank, peer), own in messages.items():
            theirs = [counterpart(action) for action in messages[peer, rank]]
            assert own == theirs, f"{label}, ranks {rank} and {peer}: {own} != {theirs}"


def test_messages_cross_ranks_only() -> None:
    """One message per microbatch and cut between ranks and direction; the tip of the V hands over locally."""
    table = schedules.zbv(2, v_ranks(2), 3)
    lowered = lower(table, v_ranks(2), 4)
    counts = {kind: sum(action.kind is kind for actions in lowered for action in actions) for kind in Kind}
    assert counts[Kind.SEND_F] == counts[Kind.RECV_F] == counts[Kind.SEND_B] == counts[Kind.RECV_B] == 2 * 3, counts
    tip = [a for actions in lowered for a in actions if (a.kind, a.stage) in ((Kind.SEND_F, 1), (Kind.RECV_F, 2))]
    assert not tip, f"stages 1 and 2 share rank 1, yet {tip}"


def test_narrated_example() -> None:
    """The docstring's two ranks and one microbatch."""
    lowered = lower(schedules.one_f_one_b(2, (0, 1), 1), (0, 1), 2)
    assert [" ".join(map(str, actions)) for actions in lowered] == [
        "0F0 0SEND_F0 0RECV_B0 0B0",
        "1RECV_F0 1F0 1B0 1SEND_B0",
    ]


def test_stuck_tables_name_the_actions() -> None:
    """A backward before its forward, and a W before its I, are reported per rank."""
    backward_first = ((Action(Kind.B, 0, 0), Action(Kind.F, 0, 0)), (Action(Kind.F, 1, 0),))
    with pytest.raises(ValueError, match="rank 0 at 0B0, rank 1 at 1F0"):
        lower(backward_first, (0, 1), 2)
    with pytest.raises(ValueError, match="rank 0 at 0W0"):
        lower(((Action(Kind.F, 0, 0), Action(Kind.W, 0, 0), Action(Kind.I, 0, 0)),), (0,), 1)
