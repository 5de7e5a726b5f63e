"""DeepSpeed's two pipelines, ``PipelineModule`` (1F1B) and ``DualPipeVModule``, with given borders between stages."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import DualPipeVModule, PipelineModule
from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceGrads
from torch import Tensor

from peers.cuts import Borders

DATA = "data"


def deepspeed_engine(
    layers: Sequence[Any],
    borders: Borders,
    num_ranks: int,
    micro_batches: int,
    rows: int,
    *,
    dual_pipe_v: bool,
    updates: bool = True,
) -> Any:
    """An engine whose last layer returns the loss. Collective.

    Args:
        layers: layer specifications, tied ones included.
        borders: one stage per rank, or two with ``dual_pipe_v``.
        rows: of a microbatch.
        updates: a step ends with the reduction over the one data replica and the update, as ``train_batch`` does; else with
            the sum of tied gradients.
    """
    deepspeed.logger.setLevel(logging.ERROR)
    base = DualPipeVModule if dual_pipe_v else PipelineModule

    class Module(base):  # type: ignore[valid-type, misc]
        def _partition_layers(self, method: str = "uniform") -> None:
            super()._partition_layers(method)  # doubles num_stages under DualPipeV
            self.parts = list(borders)
            self._set_bounds(*borders[self.stage_id : self.stage_id + 2])
            if dual_pipe_v:
                mirror = self.num_stages - 1 - self.stage_id
                self.phase_bounds = [(self._local_start, self._local_stop), borders[mirror : mirror + 2]]

    with contextlib.redirect_stdout(None):  # the partition that is replaced here
        # DeepSpeed divides the loss by the microbatches; losses here are parts of a sum.
        module = Module(
            layers, num_stages=num_ranks, partition_method="uniform", loss_fn=lambda loss, _: loss * micro_batches
        )
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.0),
            config={
                "train_micro_batch_size_per_gpu": rows,
                "gradient_accumulation_steps": micro_batches,
                "train_batch_size": rows * micro_batches,
                "steps_per_print": 10**9,
                "zero_optimization": {"stage": 0},
            },
            dist_init_required=False,
        )
    if not updates:
        _end_before_update(engine)
    return engine


def train_batch(engine: Any, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A step on one input per microbatch; DeepSpeed wants labels, too."""
    labels = torch.zeros(1)
    batches = [(tensor, labels) for tensor in inputs]
    return lambda: engine.train_batch(data_iter=itertools.chain(batches))


def _end_before_update(engine: Any) -> None:
    """Leave out what comes after the last backward and the tied gradients, so that gradients can be read and compared."""
    make = engine._train_schedule

    def without_update() -> list[list[Any]]:
        schedule = make()
        steps = [[c for c in commands if not isinstance(c, (ReduceGrads, OptimizerStep))] for commands in schedule]
        return _Steps(steps, schedule.num_pipe_buffers())

    engine._train_schedule = without_update


class _Steps(list[list[Any]]):
    """A schedule that is written out."""

    def __init__(self, steps: list[list[Any]], num_buffers: int) -> None:
        super().__init__(steps)
        self._num_buffers = num_buffers

    def num_pipe_buffers(self) -> int:
        return self._num_buffers
