"""dist_mtp's own pipeline, as its trainer builds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from dist_mtp.model.transformer import LanguageModel, MicroBatch
from dist_mtp.pipeline.plan import Plan
from dist_mtp.pipeline.runtime import PipelineRuntime
from dist_mtp.pipeline.stage import Stage


def our_step(
    plan: Plan, model: LanguageModel, hidden_shape: tuple[int, int, int], batches: Sequence[MicroBatch]
) -> Callable[[], object]:
    """A step of the plan's own table on this rank, in fp32.

    Args:
        model: units of this rank's stages, or what looks like them to :class:`Stage`.
        hidden_shape: [B, T, D].
    """
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    stages = {
        stage.index: Stage(stage.index, model, stage.unit_names, collect_gradients=lambda: None)
        for stage in plan.stages_of(rank)
    }
    runtime = PipelineRuntime(
        plan,
        stages,
        pp_rank=rank,
        group=group,
        global_rank=lambda pp_rank: pp_rank,
        hidden_shape=hidden_shape,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return lambda: runtime.train_step(batches)
