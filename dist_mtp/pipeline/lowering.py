"""Lowering: from what ranks compute to what they also send and receive.

A schedule lists only computation. Which messages follow from it, and at which place of both ends' lists they stand, is
decided here once, by playing the table through.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from dist_mtp.pipeline.table import Action, Kind, Table


def lower(table: Table, stage_to_rank: Sequence[int], num_stages: int) -> Table:
    """Insert SEND and RECV actions into a table of computation.

    The table is played through in sweeps: in each sweep every rank runs its next action if its inputs are there. An F
    whose next stage lives on another rank is followed by ``SEND_F`` here and, at that same moment, by ``RECV_F`` at the
    end of the peer's list; I and B likewise send the gradient back. Neighbouring stages on one rank hand tensors over
    locally, without an action.

    Two ranks (stages 0 and 1), one microbatch::

        0F0           1F0 1B0            0F0 0SEND_F0              0RECV_B0 0B0
                 0B0                ->         1RECV_F0 1F0 1B0 1SEND_B0

    Both ends of each pair of ranks therefore see their messages in one global order. Neither channels that deliver in
    order nor sends that wait for the receiver can deadlock on it: executing all lists in the order of this playthrough
    is always possible. A receive stands *early* in its list, as it is meant to be posted without waiting; the action
    that needs the message waits.

    Args:
        table: computation of each rank; may be a table of forwards only.
        stage_to_rank: rank of each stage.
        num_stages: stages of the whole pipeline.

    Raises:
        ValueError: no rank can go on; the message names the action each unfinished rank is stuck at.
    """
    lowered: list[list[Action]] = [[] for _ in table]
    position = [0] * len(table)
    done: set[Action] = set()

    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(table):
            if position[rank] == len(actions):
                continue
            action = actions[position[rank]]
            if not inputs_ready(action, done, num_stages):
                continue
            lowered[rank].append(action)
            done.add(action)
            for peer, message in _messages(action, stage_to_rank, num_stages):
                lowered[peer].append(message)
            position[rank] += 1
            progress = True

    stuck = {rank: actions[position[rank]] for rank, actions in enumerate(table) if position[rank] < len(actions)}
    if stuck:
        shown = ", ".join(f"rank {rank} at {action}" for rank, action in stuck.items())
        raise ValueError(f"the schedule cannot progress: {shown}")
    return tuple(tuple(actions) for actions in lowered)


def inputs_ready(action: Action, done: Container[Action], num_stages: int) -> bool:
    """Whether everything that ``action`` reads was computed: the data dependencies of pipeline training.

    F of stage s needs F of s - 1; I and B need the gradient from s + 1 (at the last stage: their own forward, which
    computes the loss); W needs its I.
    """
    stage, microbatch = action.stage, action.microbatch
    if action.kind is Kind.F:
        return stage == 0 or Action(Kind.F, stage - 1, microbatch) in done
    if action.kind is Kind.W:
        return Action(Kind.I, stage, microbatch) in done
    if Action(Kind.F, stage, microbatch) not in done:
        return False
    if stage == num_stages - 1:
        return True
    return Action(Kind.I, stage + 1, microbatch) in done or Action(Kind.B, stage + 1, microbatch) in done


def _messages(action: Action, stage_to_rank: Sequence[int], num_stages: int) -> list[tuple[int, Action]]:
    """The send on this rank and the receive on its peer that follow ``action``, as (rank, action) pairs."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind is Kind.F:
        neighbour, send, receive = stage + 1, Kind.SEND_F, Kind.RECV_F
    elif action.kind in (Kind.I, Kind.B):
        neighbour, send, receive = stage - 1, Kind.SEND_B, Kind.RECV_B
    else:
        return []
    if not 0 <= neighbour < num_stages or stage_to_rank[neighbour] == stage_to_rank[stage]:
        return []
    return [
        (stage_to_rank[stage], Action(send, stage, microbatch)),
        (stage_to_rank[neighbour], Action(receive, neighbour, microbatch)),
    ]
