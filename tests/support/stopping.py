"""Rank functions of ``tests/parallel/test_stop.py``: one rank is told to stop at an awkward moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from support.parity import Layout, Variant, make_config, make_trainer

import dist_mtp.trainer as trainer_module

STOP_STEP = 2
MOMENTS = ("after_reduction", "in_evaluation")


def stop_one_rank(folder: Path) -> None:
    """Train twice; write step, stopping and metrics' names of this rank to ``MOMENT.rank_K.json``."""
    for moment, told_rank in zip(MOMENTS, (0, 1), strict=True):
        extra = (("train.steps", 5), ("eval.every", 1), ("eval.batches", 2), ("debug.dump_steps", []))
        variant = Variant(1, extra=(*extra, ("run.dir", str(folder / moment))))
        trainer = make_trainer(make_config(folder, Layout("v", "zbv", 2), variant))
        if trainer.mesh.rank == told_rank:
            _signal_at(trainer, moment)
        metrics = trainer.run()
        result = {"step": trainer.step, "stopping": trainer.stopping, "evaluated": "eval_loss_main" in metrics}
        (folder / f"{moment}.rank_{os.environ['RANK']}.json").write_text(json.dumps(result))
        dist.barrier()


def _signal_at(trainer: Any, moment: str) -> None:
    """Set the flag that a signal handler sets, when this rank passes ``moment`` in step ``STOP_STEP``."""

    def told() -> None:
        trainer.stop_signal = trainer.stop_signal or trainer.step == STOP_STEP

    if moment == "after_reduction":
        original = trainer_module.reduce_health

        def reduce_health(*arguments: Any, **keywords: Any) -> Any:
            result = original(*arguments, **keywords)
            told()
            return result

        trainer_module.reduce_health = reduce_health
    else:
        evaluate = trainer.runtime.evaluate

        def evaluate_and_stop(batches: Any) -> Any:
            result = evaluate(batches)
            told()
            return result

        trainer.runtime.evaluate = evaluate_and_stop
