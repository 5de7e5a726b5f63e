"""What the ranks of ``tests/parallel/test_timeline.py`` do: train with and without measured steps, and with a slow stage."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from support.parity import STEPS, Layout, Variant, make_config, make_trainer

from dist_mtp import step_stats
from dist_mtp.monitor.monitor import Monitor
from dist_mtp.pipeline.timeline import FIRST_STEP, MeasuredTimeline

LAYOUT = Layout("v", "zbv", 2, 2)
SLOW_S, LATE_S = 1.0, 4.0
"""What stage 1 takes longer for microbatch 0 in the first data replica, and how much later its rank begins the step."""


class Listener(Monitor):
    """Keeps the timelines that the trainer reports."""

    def __init__(self) -> None:
        self.timelines: list[MeasuredTimeline] = []

    def timeline(self, step: int, timeline: MeasuredTimeline) -> None:
        self.timelines.append(timeline)


def memory_gib(rank: int) -> float:
    """What world rank ``rank`` pretends to use."""
    return 1.0 + rank


def world_of_4(folder: Path) -> None:
    """Write ``plain``, ``measured`` and ``slow``, each ``NAME.rank_K.json`` with metrics and timelines of each step."""
    step_stats._peak_memory_gib = lambda device: memory_gib(dist.get_rank())  # type: ignore[assignment]
    _train(folder, "plain", every=0, steps=STEPS)
    _train(folder, "measured", every=1, steps=STEPS)
    _train(folder, "slow", every=1, steps=1)


def _train(folder: Path, name: str, *, every: int, steps: int) -> None:
    config = make_config(folder, LAYOUT, Variant(1, extra=(("debug.dump_steps", []),)))
    trainer = make_trainer(
        dataclasses.replace(config, monitor=dataclasses.replace(config.monitor, timeline_every=every))
    )
    trainer.monitor = Listener()
    trainer.start = -FIRST_STEP  # so that the very first step may be measured
    if name == "slow" and (trainer.mesh.pp_rank, trainer.mesh.dp_rank) == (1, 0):
        _slow_down(trainer)
    rows = []
    for trainer.step in range(1, steps + 1):
        rows.append(trainer.train_step())
    result = {"rows": rows, "timelines": [timeline.to_json() for timeline in trainer.monitor.timelines]}
    (folder / f"{name}.rank_{trainer.mesh.rank}.json").write_text(json.dumps(result))
    dist.barrier()


def _slow_down(trainer: Any) -> None:
    stage, step = trainer.stages[1], trainer.batches.step
    forward = stage.forward

    def slow_forward(microbatch: int, *arguments: Any) -> Any:
        if microbatch == 0:
            time.sleep(SLOW_S)
        return forward(microbatch, *arguments)

    def late_step(*arguments: Any) -> Any:
        time.sleep(LATE_S)
        return step(*arguments)

    stage.forward, trainer.batches.step = slow_forward, late_step
