"""Pipelines of ``torch.distributed.pipelining`` over sleeping layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.precision.weight_grads import WeightGradQueue, attach_queue, run
from peers.cuts import Borders
from peers.sleeping import HIDDEN_SHAPE, SleepingEmbedding, add_embedding, layer_modules


def torch_pipeline(
    name: str, costs: Sequence[UnitCost], borders: Borders, stage_to_rank: Sequence[int], micro_batches: int
) -> Callable[[], None]:
    """A step of the schedule ``name``, on this rank. Collective.

    Where the first and the last stage are on different ranks both have an embedding, and its gradients are added up after
    the step.

    Args:
        costs: of embedding, whole layers and head.
    """
    rank, num_stages = dist.get_rank(), len(stage_to_rank)
    mine = [stage for stage, owner in enumerate(stage_to_rank) if owner == rank]
    holds_ends = 0 in mine or num_stages - 1 in mine
    embedding = SleepingEmbedding(costs[0]) if holds_ends else None
    ends_are_apart = stage_to_rank[0] != stage_to_rank[-1]
    # Collective, so every rank makes it.
    ends = dist.new_group([stage_to_rank[0], stage_to_rank[-1]]) if ends_are_apart else None

    schedule_class = get_schedule_class(name)
    has_several = issubclass(schedule_class, PipelineScheduleMulti)
    ids = torch.zeros(micro_batches, 1, dtype=torch.int64)
    hidden, loss = torch.zeros(HIDDEN_SHAPE, requires_grad=True), torch.zeros((), requires_grad=True)
    stages = []
    for stage in mine:
        chunk = _Chunk(costs, borders[stage], borders[stage + 1], embedding)
        sizes: dict[str, Any] = {
            "input_args": ids[:1] if stage == 0 else hidden,
            "output_args": hidden if stage < num_stages - 1 else loss,
        }
        device = torch.device("cpu")
        stages.append(
            _SplitStage(chunk, stage, num_stages, device, **sizes)
            if has_several
            else PipelineStage(chunk, stage, num_stages, device, **sizes)
        )
    schedule = schedule_class(
        stages if has_several else stages[0],
        micro_batches,
        loss_fn=lambda output, target: output / micro_batches,
        scale_grads=False,  # would divide the shared embedding's gradient once per stage
    )

    def step() -> None:
        target = torch.zeros(micro_batches) if num_stages - 1 in mine else None
        schedule.step(*((ids,) if 0 in mine else ()), target=target, losses=[], return_outputs=False)
        if ends is not None and embedding is not None:
            dist.all_reduce(embedding.table.grad, group=ends)

    return step


class _Chunk(nn.Module):
    """The layers of one stage."""

    def __init__(self, costs: Sequence[UnitCost], start: int, stop: int, embedding: SleepingEmbedding | None) -> None:
        super().__init__()
        self.embedding = embedding
        self.is_first, self.is_last = start == 0, stop == len(costs)
        first = start + 1 if self.is_first else start
        self.layers = nn.ModuleList(kind(cost) for kind, cost in layer_modules(costs, first, stop))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_first:
            assert self.embedding is not None
            x = self.embedding(x)
        for index, layer in enumerate(self.layers):
            if self.is_last and index == len(self.layers) - 1:
                assert self.embedding is not None
                x = add_embedding(self.embedding, x)
            x = layer(x)
        return x


class _SplitStage(PipelineStage):
    """Leaves weight gradients to W: without this, torch splits a backward by a walk over autograd's graph, which sleeps twice.

    With ``dw_builder`` torch runs the same backward for I as for B; only ``full_backward`` says which one it is.
    """

    def __init__(
        self, submodule: nn.Module, stage_index: int, num_stages: int, device: torch.device, **sizes: Any
    ) -> None:
        self.queue = WeightGradQueue()
        attach_queue(submodule, self.queue)
        super().__init__(submodule, stage_index, num_stages, device, dw_builder=self._take, **sizes)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self.queue.deferring = not full_backward
        try:
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        finally:
            self.queue.deferring = False

    def _take(self) -> Callable[[], None]:
        closures = self.queue.take()
        return lambda: run(closures)
