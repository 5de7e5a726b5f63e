"""Schedules: the order in which each rank computes, as plain tables.

Every schedule is a function ``(num_ranks, stage_to_rank, micro_batches) -> Table`` registered by name. P is the number
of pipeline ranks, M the number of microbatches; r counts ranks. A new schedule is one such function and one line of
:data:`SCHEDULES`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

from dist_mtp.pipeline.table import Action, Kind, Table

Schedule = Callable[[int, Sequence[int], int], Table]


def build(name: str, num_ranks: int, stage_to_rank: Sequence[int], micro_batches: int) -> Table:
    """The table of the registered schedule ``name``."""
    return SCHEDULES[name](num_ranks, stage_to_rank, micro_batches)


def gpipe(num_ranks: int, stage_to_rank: Sequence[int], micro_batches: int) -> Table:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965).

    Ranks with several stages finish one stage for all microbatches before the next. Simple, and a reference for the
    other schedules; holds the activations of all M microbatches.
    """

    def rank_actions(rank: int) -> tuple[Action, ...]:
        stages = _stages_of(rank, stage_to_rank)
        forwards = [Action(Kind.F, stage, m) for stage in stages for m in range(micro_batches)]
        backwards = [Action(Kind.B, stage, m) for stage in reversed(stages) for m in range(micro_batches)]
        return tuple(forwards + backwards)

    return tuple(rank_actions(rank) for rank in range(num_ranks))


def one_f_one_b(num_ranks: int, stage_to_rank: Sequence[int], micro_batches: int) -> Table:
    """1F1B (PipeDream-Flush, arXiv 2006.09503; arXiv 2104.04473, section 2.2), one stage per rank, any M.

    Rank r holds at most P - r microbatches: as many as are on their way to the last rank and back. P=2, M=3::

        rank 0   0F0 0F1 0B0 0F2 0B1 0B2
        rank 1   1F0 1B0 1F1 1B1 1F2 1B2
    """

    def rank_actions(rank: int) -> tuple[Action, ...]:
        line = _Line()
        (stage,) = _stages_of(rank, stage_to_rank)
        warmup = min(num_ranks - 1 - rank, micro_batches)
        # 1. Warmup: fill the ranks between this one and the last.
        for _ in range(warmup):
            line.add(Kind.F, stage)
        # 2. Steady state: each further forward is paid for with a backward, so memory does not grow.
        for _ in range(micro_batches - warmup):
            line.add(Kind.F, stage)
            line.add(Kind.B, stage)
        # 3. Cooldown: drain what the warmup put in.
        for _ in range(warmup):
            line.add(Kind.B, stage)
        return line.actions()

    return tuple(rank_actions(rank) for rank in range(num_ranks))


def interleaved_1f1b(num_ranks: int, stage_to_rank: Sequence[int], micro_batches: int) -> Table:
    """Interleaved 1F1B (Megatron-LM, arXiv 2104.04473, section 2.2), any number v of stages per rank.

    Microbatches go through a rank in rounds of about P: the whole round passes the rank's first stage, then its second,
    and so on; then the next round starts. Backwards follow the same rhythm with the stages reversed.

    Raises:
        ValueError: M is not divisible into ``max(1, M // P)`` rounds.
    """
    rounds = max(1, micro_batches // num_ranks)
    if micro_batches % rounds:
        raise ValueError(
            f"{micro_batches} microbatches do not divide into {rounds} rounds of {num_ranks} ranks or more"
        )
    round_size = micro_batches // rounds

    def rank_actions(rank: int) -> tuple[Action, ...]:
        line = _Line()
        stages = _stages_of(rank, stage_to_rank)
        forwards = [stage for _ in range(rounds) for stage in stages for _ in range(round_size)]
        backwards = [stage for _ in range(rounds) for stage in reversed(stages) for _ in range(round_size)]
        # 1. Warmup: one round through all stages but the last, and two more forwards per hop from the last rank, for
        #    each message takes one slot there and one back.
        warmup = min((len(stages) - 1) * round_size + 2 * (num_ranks - 1 - rank), len(forwards))
        for stage in forwards[:warmup]:
            line.add(Kind.F, stage)
        # 2. Steady state: one forward, one backward.
        steady = len(forwards) - warmup
        for forward, backward in zip(forwards[warmup:], backwards[:steady], strict=True):
            line.add(Kind.F, forward)
            line.add(Kind.B, backward)
        # 3. Cooldown: the remaining backwards.
        for stage in backwards[steady:]:
            line.add(Kind.B, stage)
        return line.actions()

    return tuple(rank_actions(rank) for rank in range(num_ranks))


def zbv(num_ranks: int, stage_to_rank: Sequence[int], micro_batches: int) -> Table:
    """ZB-V, the zero-bubble schedule on V placement (arXiv 2401.10241, section 6), any M.

    Each rank has a *down* stage r and an *up* stage 2P-1-r. With equal times of F, I and W no rank ever waits between
    its first and its last action, and it holds at most 2P half-size activations, as much as 1F1B.

    The pattern needs 2P - 1 microbatches to unfold. With fewer it is planned for 2P - 1 and the superfluous ones are
    struck out: what remains is in a valid order, as actions of different microbatches never wait for each other.
    """
    planned = max(2 * num_ranks - 1, micro_batches)

    def rank_actions(rank: int) -> tuple[Action, ...]:
        line = _Line()
        down, up = _stages_of(rank, stage_to_rank)
        below = num_ranks - rank  # ranks from this one to the tip of the V, itself included
        # 1. Fill the way down to the tip of the V and back up to this rank.
        for _ in range(2 * below - 1):
            line.add(Kind.F, down)
        # 2. Microbatches come back up: forward both stages in turn until the first one reaches the head on rank 0.
        for _ in range(rank):
            line.add(Kind.F, up)
            line.add(Kind.F, down)
        # 3. Backwards of the up stage begin; those of the down stage are still on their way.
        for _ in range(below):
            line.add_each(up, Kind.F, Kind.I, Kind.W)
        # 4. Steady state: a forward and a backward on both stages, until all microbatches are forwarded.
        while line.count(Kind.F, up) < planned:
            if line.count(Kind.F, down) < planned:
                line.add(Kind.F, down)
            line.add_each(down, Kind.I, Kind.W)
            line.add_each(up, Kind.F, Kind.I, Kind.W)
        # 5. Cooldown: input gradients first, for other ranks wait for them ...
        for _ in range(rank):
            line.add(Kind.I, down)
            line.add(Kind.I, up)
        # 6. ... then weight gradients fill the gaps between the last ones ...
        for _ in range(below):
            line.add_each(down, Kind.I, Kind.W)
        # 7. ... and whatever is left of them comes at the end.
        for stage in (up, down):
            while line.count(Kind.W, stage) < planned:
                line.add(Kind.W, stage)
        return tuple(action for action in line.actions() if action.microbatch < micro_batches)

    return tuple(rank_actions(rank) for rank in range(num_ranks))


def dualpipev(num_ranks: int, stage_to_rank: Sequence[int], micro_batches: int) -> Table:
    """DualPipeV (github.com/deepseek-ai/DualPipe; DualPipe: arXiv 2412.19437, section 3.2.1), M >= 2P.

    In the steady state the forward of one microbatch is paired with the full backward of another on the rank's other
    stage, so that one's expert communication can hide behind the other's computation. A pair is two entries in a row.

    Raises:
        ValueError: fewer than 2P microbatches.
    """
    if micro_batches < 2 * num_ranks:
        raise ValueError(f"{micro_batches} microbatches are fewer than the {2 * num_ranks} stages of dualpipev")

    def rank_actions(rank: int) -> tuple[Action, ...]:
        line = _Line()
        down, up = _stages_of(rank, stage_to_rank)
        below = num_ranks - 1 - rank  # ranks between this one and the tip of the V
        owed: deque[int] = deque()  # stages whose weight gradient was put off, oldest first

        def add_input_gradient(stage: int) -> None:
            line.add(Kind.I, stage)
            owed.append(stage)

        def pay_weight_gradient() -> None:
            if owed:
                line.add(Kind.W, owed.popleft())

        def add_backward(stage: int, split: bool) -> None:
            if split:
                add_input_gradient(stage)
            else:
                line.add(Kind.B, stage)

        # 1. Fill the way down to the tip of the V and back.
        for _ in range(2 * below):
            line.add(Kind.F, down)
        # 2. Forward both stages in turn until the first microbatch reaches the head on rank 0.
        for _ in range(rank + 1):
            line.add(Kind.F, down)
            line.add(Kind.F, up)
        # 3. First backwards of the up stage, split so that the input gradient travels on at once.
        for _ in range(below):
            add_input_gradient(up)
            pay_weight_gradient()
            line.add(Kind.F, up)
        # 4. Steady state: down's forward with up's backward, then up's forward with down's backward.
        for _ in range(micro_batches - 2 * num_ranks + rank + 1):
            line.add(Kind.F, down)
            line.add(Kind.B, up)
            line.add(Kind.F, up)
            line.add(Kind.B, down)
        # 5. No microbatches are left for the down stage's forward.
        for _ in range(below):
            line.add(Kind.B, up)
            line.add(Kind.F, up)
            line.add(Kind.B, down)
        # 6. Backwards only. Their second half is split: it puts off weight gradients to fill the gaps of step 7.
        backwards = [stage for _ in range(rank + 1) for stage in (up, down)]
        for position, stage in enumerate(backwards):
            add_backward(stage, split=position > rank)
        # 7. The last input gradients come down the V one by one; weight gradients fill the time between.
        for _ in range(below):
            pay_weight_gradient()
            add_input_gradient(down)
        # 8. The remaining weight gradients.
        while owed:
            pay_weight_gradient()
        return line.actions()

    return tuple(rank_actions(rank) for rank in range(num_ranks))


def forward_only(num_ranks: int, stage_to_rank: Sequence[int], micro_batches: int) -> Table:
    """Forwards for evaluation, for any placement and any M.

    Each rank works in the order of (microbatch + stage), that is, of the earliest slot in which the forward could run.
    The forward before it in the pipeline has a smaller sum, so executing all ranks in the order of the sum is always
    possible; and no microbatch enters long before it can go on, so few hidden states wait in buffers.
    """

    def rank_actions(rank: int) -> tuple[Action, ...]:
        stages = _stages_of(rank, stage_to_rank)
        forwards = [Action(Kind.F, stage, m) for stage in stages for m in range(micro_batches)]
        return tuple(sorted(forwards, key=lambda action: (action.microbatch + action.stage, action.microbatch)))

    return tuple(rank_actions(rank) for rank in range(num_ranks))


SCHEDULES: dict[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
    "zbv": zbv,
    "dualpipev": dualpipev,
}


class _Line:
    """The actions of one rank while they are written down; microbatches of a (kind, stage) are numbered as they come."""

    def __init__(self) -> None:
        self._actions: list[Action] = []
        self._next: Counter[tuple[Kind, int]] = Counter()

    def add(self, kind: Kind, stage: int) -> None:
        """Append ``kind`` for the stage's next microbatch. A full backward counts as I and W."""
        gradients = (Kind.I, Kind.W)
        self._actions.append(Action(kind, stage, self.count(Kind.I if kind is Kind.B else kind, stage)))
        for counted in gradients if kind is Kind.B else (kind,):
            self._next[counted, stage] += 1

    def add_each(self, stage: int, *kinds: Kind) -> None:
        for kind in kinds:
            self.add(kind, stage)

    def count(self, kind: Kind, stage: int) -> int:
        """How often ``kind`` was appended for the stage."""
        return self._next[kind, stage]

    def actions(self) -> tuple[Action, ...]:
        return tuple(self._actions)


def _stages_of(rank: int, stage_to_rank: Sequence[int]) -> list[int]:
    """The rank's stages, in pipeline order."""
    return [stage for stage, owner in enumerate(stage_to_rank) if owner == rank]
