"""The ranks of ``actions``: stages whose units compute nothing and pass on hidden states of one number."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from peers.ours import our_runtime
from torch import Tensor, nn

from dist_mtp.model.transformer import LanguageModel
from dist_mtp.parallel.mesh import init_process_group
from dist_mtp.pipeline.plan import make_plan
from dist_mtp.pipeline.table import Action, Kind
from dist_mtp.signals import end_with_parent
from planner.actions import TIMEOUT_S, Case
from planner.configs import v3_config

HIDDEN_SHAPE = (1, 1, 1)
SCHEDULE = "zbv"
"""Runs at any size, and its table is one formula."""
WARM_UP = 3


class Nothing(nn.Module):
    """What :class:`~dist_mtp.pipeline.stage.Stage` asks of a rank's units, with nothing to compute: even the loss is the
    hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(HIDDEN_SHAPE))

    def unit_modules(self, unit: str) -> list[nn.Module]:
        return []

    def run_unit(self, unit: str, hidden: Tensor | None, batch: object) -> Tensor:
        return self.table if hidden is None else hidden

    def run_head(self, hidden: Tensor, batch: object, *, accumulate_in_forward: bool) -> tuple[Tensor, None]:
        return hidden, None


def run_rank(folder: Path) -> None:
    """Time the cases of ``folder/spec.json``; leaves medians in ``folder/actions.RANK.json``."""
    end_with_parent()
    torch.set_num_threads(1)
    init_process_group(timeout_s=TIMEOUT_S, device="cpu")
    spec = json.loads((folder / "spec.json").read_text())
    steps = [_Steps(Case(**described)) for described in spec["cases"]]
    # In turn, so that a slow spell of the machine hits all cases alike.
    for number in range(WARM_UP + spec["rounds"]):
        for step in steps:
            step.run(counts=number >= WARM_UP)
    medians = [step.medians() for step in steps]
    (folder / f"actions.{dist.get_rank()}.json").write_text(json.dumps(medians))
    dist.barrier()
    dist.destroy_process_group()


class _Clock:
    """Reads this thread's CPU time where the runtime says what it does: neither waits nor other processes count."""

    def __init__(self) -> None:
        self.actions: list[tuple[Action, int]] = []
        """With the time at which the runtime came to it."""
        self.marks: list[int] = []
        """Three for each computation: before and after the wait for its input, after the computation."""

    def begin(self, action: Action) -> None:
        self.actions.append((action, time.thread_time_ns()))

    def mark(self) -> None:
        self.marks.append(time.thread_time_ns())

    def take(self) -> dict[str, list[int]]:
        """Nanoseconds by what they were for; the step's last action, whose end nobody tells, is left out."""
        marks, spent = iter(self.marks), defaultdict(list)
        for (action, start), (_, end) in zip(self.actions, self.actions[1:], strict=False):
            if not action.kind.is_compute:
                spent["send" if action.kind in (Kind.SEND_F, Kind.SEND_B) else "receive"].append(end - start)
                continue
            before, ready, done = next(marks), next(marks), next(marks)
            spent[f"{action.kind.value} runtime"].append((before - start) + (end - done))
            if action.kind is not Kind.W:
                spent["input"].append(ready - before)
            spent[f"{action.kind.value} stage"].append(done - ready)
        self.actions, self.marks = [], []
        return spent


class _Steps:
    """Steps of one case, and what their actions took."""

    def __init__(self, case: Case) -> None:
        overrides = (f"model.num_layers={case.num_layers}", f"pipeline.schedule={SCHEDULE}")
        plan = make_plan(v3_config(case.num_ranks, case.micro_batches, *overrides))
        self._clock = _Clock()
        self._runtime = our_runtime(plan, cast(LanguageModel, Nothing()), HIDDEN_SHAPE, self._clock.begin)
        self._batches = [cast(Any, None)] * plan.micro_batches  # the stub does not look at them
        self._spent: dict[str, list[int]] = defaultdict(list)

    def run(self, *, counts: bool) -> None:
        """One step. Collective."""
        dist.barrier()
        self._runtime.train_step(self._batches, self._clock.mark)
        for name, nanoseconds in self._clock.take().items():
            if counts:
                self._spent[name] += nanoseconds

    def medians(self) -> dict[str, float]:
        """Microseconds by what they were for."""
        return {name: median(nanoseconds) / 1e3 for name, nanoseconds in self._spent.items()}
