"""Action tables: what every pipeline rank does, in order.

A schedule is nothing but such a table. Functions build it (``schedules``), complete it with communication
(``lowering``), time it (``simulate``) and execute it (``runtime``).
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


class Kind(enum.Enum):
    """What an action does with one microbatch on one stage."""

    F = "F"
    """Forward."""
    I = "I"  # noqa: E741 - the zero-bubble literature's name
    """Input gradient: the half of the backward that the previous stage waits for (arXiv 2401.10241)."""
    W = "W"
    """Weight gradient: the half of the backward that nobody waits for."""
    B = "B"
    """Full backward, I and W at once."""
    SEND_F = "SEND_F"
    """Stage s sends its output to stage s + 1."""
    RECV_F = "RECV_F"
    """Stage s receives its input from stage s - 1."""
    SEND_B = "SEND_B"
    """Stage s sends the gradient of its input to stage s - 1."""
    RECV_B = "RECV_B"
    """Stage s receives the gradient of its output from stage s + 1."""

    @property
    def is_compute(self) -> bool:
        return self in (Kind.F, Kind.I, Kind.W, Kind.B)


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a table. ``str`` gives the field's shorthand: ``2I5`` is I of microbatch 5 on stage 2."""

    kind: Kind
    stage: int
    """0-based virtual stage."""
    microbatch: int
    """0-based microbatch of the step."""

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    __repr__ = __str__

    @staticmethod
    def parse(text: str) -> Action:
        """Inverse of ``str``.

        >>> Action.parse("2I5")
        2I5

        Raises:
            ValueError: ``text`` is no action.
        """
        found = re.fullmatch(r"(\d+)([A-Z_]+)(\d+)", text)
        if found is None:
            raise ValueError(f"{text!r} is no action such as '2I5'")
        return Action(Kind(found[2]), int(found[1]), int(found[3]))


Table = tuple[tuple[Action, ...], ...]
"""``table[rank]`` is the list of actions of that pipeline rank, in the order in which it runs them."""


def check_complete(
    table: Table, num_stages: int, micro_batches: int, stage_to_rank: Sequence[int] | None = None
) -> None:
    """Check that a table trains every microbatch on every stage exactly once.

    Every stage runs F once per microbatch and its backward once, either as B or as one I and one W. All actions of a
    stage stand on one rank: ``stage_to_rank[stage]`` where that is given.

    Raises:
        ValueError: names the stage, the microbatch and what was found. A fault of the schedule, not of the user.
    """
    counts: Counter[Action] = Counter()
    owner: dict[int, int] = dict(enumerate(stage_to_rank)) if stage_to_rank is not None else {}
    for rank, actions in enumerate(table):
        for action in actions:
            if not action.kind.is_compute:
                continue
            if not (0 <= action.stage < num_stages and 0 <= action.microbatch < micro_batches):
                raise ValueError(f"{action} is outside of {num_stages} stages and {micro_batches} microbatches")
            if owner.setdefault(action.stage, rank) != rank:
                raise ValueError(f"{action} stands on rank {rank}, its stage belongs to rank {owner[action.stage]}")
            counts[action] += 1
    for stage in range(num_stages):
        for microbatch in range(micro_batches):
            found = {kind: counts[Action(kind, stage, microbatch)] for kind in (Kind.F, Kind.I, Kind.W, Kind.B)}
            if tuple(found.values()) not in ((1, 0, 0, 1), (1, 1, 1, 0)):
                shown = ", ".join(f"{count} x {kind.value}" for kind, count in found.items())
                raise ValueError(
                    f"stage {stage}, microbatch {microbatch}: expected F and B, or F, I and W; got {shown}"
                )
