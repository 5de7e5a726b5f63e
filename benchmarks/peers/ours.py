"""dist_mtp's own pipeline, as its trainer builds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from dist_mtp.model.transformer import LanguageModel, MicroBatch
from dist_mtp.pipeline.plan import Plan
from dist_mtp.pipeline.runtime import PipelineRuntime
from dist_mtp.pipeline.stage import Stage
from dist_mtp.pipeline.table import Action


def our_runtime(
    plan: Plan,
    model: LanguageModel,
    hidden_shape: tuple[int, int, int],
    on_action: Callable[[Action], None] = lambda action: None,
) -> PipelineRuntime:
    """This rank's runtime over the plan's own table, in fp32, one rank per pipeline rank.

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
    return PipelineRuntime(
        plan,
        stages,
        pp_rank=rank,
        group=group,
        global_rank=lambda pp_rank: pp_rank,
        hidden_shape=hidden_shape,
        dtype=torch.float32,
        device=torch.device("cpu"),
        on_action=on_action,
    )


def our_step(
    plan: Plan, model: LanguageModel, hidden_shape: tuple[int, int, int], batches: Sequence[MicroBatch]
) -> Callable[[], object]:
    """A step of :func:`our_runtime`."""
    runtime = our_runtime(plan, model, hidden_shape)
    return lambda: runtime.train_step(batches)
