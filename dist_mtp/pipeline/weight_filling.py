"""Weight filling: a pattern's order of forwards and input gradients, with weight gradients where ranks would wait.

Patterns such as ``zbv`` and ``dualpipev`` place weight gradients for stages of equal times. Nobody waits for them, so with
unequal times they can move: into the gaps, and before a forward that needs the memory they free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.pipeline.list_schedule import FORWARD, INPUT, WEIGHT, ListSchedule, Step, period_of
from dist_mtp.pipeline.table import Kind, Table


def forward_and_input_order(table: Table) -> list[list[Step]]:
    """A table's F and I in their order; a full backward counts as I, its W may go elsewhere."""
    kinds = {Kind.F: FORWARD, Kind.I: INPUT, Kind.B: INPUT}
    return [
        [(kinds[action.kind], action.stage, action.microbatch) for action in line if action.kind in kinds]
        for line in table
    ]


def fill_weights(
    order: Sequence[Sequence[Step]],
    stage_costs: Sequence[UnitCost],
    stage_to_rank: Sequence[int],
    micro_batches: int,
    activation_caps: Sequence[float],
    message_seconds: float = 0.0,
    patience: float = 0.1,
) -> ListSchedule | None:
    """Insert weight gradients, oldest first; None if the order does not fit into ``activation_caps``.

    Args:
        order: of each rank, from :func:`forward_and_input_order`.
        patience: a weight gradient runs in a gap if at least this share of it fits in. What sticks out delays the rank.

    Other arguments as in :func:`~dist_mtp.pipeline.list_schedule.list_schedule`.
    """
    num_ranks, last = len(order), len(stage_costs) - 1
    time_f = [cost.time_f for cost in stage_costs]
    time_i = [cost.time_i for cost in stage_costs]
    time_w = [cost.time_w for cost in stage_costs]
    held = [cost.activation_bytes for cost in stage_costs]  # from F to I
    deferred = [cost.deferred_bytes for cost in stage_costs]  # from I to W
    # End of F and I by stage and microbatch; None while unknown.
    forward_end: list[list[float | None]] = [[None] * micro_batches for _ in stage_costs]
    input_end: list[list[float | None]] = [[None] * micro_batches for _ in stage_costs]
    pending: list[deque[tuple[int, int]]] = [deque() for _ in range(num_ranks)]
    now, live, peak, position = [0.0] * num_ranks, [0] * num_ranks, [0] * num_ranks, [0] * num_ranks
    lines: list[list[Step]] = [[] for _ in range(num_ranks)]

    def run_weight(rank: int) -> None:
        stage, microbatch = pending[rank].popleft()
        lines[rank].append((WEIGHT, stage, microbatch))
        now[rank] += time_w[stage]
        live[rank] -= deferred[stage]

    def ready_at(rank: int, kind: int, stage: int, microbatch: int) -> float | None:
        """When the input of F or I is there, if that is known."""
        if kind == FORWARD:
            if stage == 0:
                return 0.0
            source, end = stage - 1, forward_end[stage - 1][microbatch]
        elif stage == last:
            return forward_end[stage][microbatch]
        else:
            source, end = stage + 1, input_end[stage + 1][microbatch]
        return end if end is None or stage_to_rank[source] == rank else end + message_seconds

    progress = True
    while progress:
        progress = False
        for rank in range(num_ranks):
            while position[rank] < len(order[rank]):
                kind, stage, microbatch = order[rank][position[rank]]
                ready = ready_at(rank, kind, stage, microbatch)
                if ready is None:
                    break
                added = held[stage] if kind == FORWARD else deferred[stage] - held[stage]
                while live[rank] + added > activation_caps[rank]:
                    if not pending[rank]:
                        return None
                    run_weight(rank)
                while (
                    ready > now[rank] and pending[rank] and now[rank] + patience * time_w[pending[rank][0][0]] <= ready
                ):
                    run_weight(rank)
                lines[rank].append((kind, stage, microbatch))
                start = max(now[rank], ready)
                if kind == FORWARD:
                    now[rank] = forward_end[stage][microbatch] = start + time_f[stage]
                else:
                    now[rank] = input_end[stage][microbatch] = start + time_i[stage]
                    pending[rank].append((stage, microbatch))
                live[rank] += added
                peak[rank] = max(peak[rank], live[rank])
                position[rank] += 1
                progress = True
    if any(position[rank] < len(order[rank]) for rank in range(num_ranks)):
        raise ValueError("the order cannot progress")
    for rank in range(num_ranks):
        while pending[rank]:
            run_weight(rank)
    turns = [end for end in input_end[last] if end is not None]
    return ListSchedule(tuple(map(tuple, lines)), max(now), tuple(peak), period_of(turns))
