"""The ranks of ``schedules_asleep.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, TiedLayerSpec

from dist_mtp.model.transformer import EMBED, LanguageModel, MicroBatch
from dist_mtp.parallel.mesh import init_process_group
from dist_mtp.pipeline.costs import UnitCost, list_units, unit_costs
from dist_mtp.pipeline.plan import Plan, make_plan
from dist_mtp.signals import end_with_parent
from peers.cuts import Borders, line, vee, whole_layers
from peers.deepspeed_pipelines import deepspeed_engine, train_batch
from peers.measuring import Contender, fine_timer, interleaved, message_seconds
from peers.ours import our_step
from peers.sleeping import (
    HIDDEN_SHAPE,
    SleepingEmbedding,
    SleepingModel,
    add_embedding,
    at_stage_ends,
    layer_modules,
)
from peers.torch_pipelines import torch_pipeline
from peers.workload import make_config, scaled

STEP_TIMEOUT_S = 120.0


def run_rank(folder: Path) -> None:
    """Time the contenders of ``folder/spec.json`` in turn; rank 0 writes ``folder/seconds.json``."""
    end_with_parent()
    fine_timer()
    torch.set_num_threads(1)
    init_process_group(timeout_s=2 * STEP_TIMEOUT_S, device="cpu")
    spec = json.loads((folder / "spec.json").read_text())
    num_ranks, micro_batches, scale = spec["ranks"], spec["micro_batches"], spec["scale"]
    contenders = []
    for schedule in spec["ours"]:
        plan = make_plan(make_config(num_ranks, micro_batches, schedule))
        contenders.append(Contender(f"dist_mtp {schedule}", our_sleeping_step(plan, scale)))
    config = make_config(num_ranks, micro_batches, "zbv")
    layers = scaled(whole_layers(unit_costs(config, plan.profile)), scale)
    for name, borders in spec["peers"].items():
        contenders.append(Contender(name, peer_step(name, layers, tuple(borders), num_ranks, micro_batches)))
    message = message_seconds(HIDDEN_SHAPE)
    seconds = interleaved(contenders, spec["rounds"], STEP_TIMEOUT_S)
    if dist.get_rank() == 0:
        (folder / "seconds.json").write_text(json.dumps({"message": message, "steps": seconds}))
    dist.barrier()
    dist.destroy_process_group()


def our_sleeping_step(plan: Plan, scale: float) -> Callable[[], object]:
    """The plan's own table over half-layer units."""
    config = make_config(plan.pp, plan.micro_batches, plan.schedule)
    names = [unit.name for unit in list_units(config)]
    borders = tuple(accumulate((len(stage.units) for stage in plan.stages), initial=0))
    units = at_stage_ends(scaled(unit_costs(config, plan.profile), scale), borders)
    costs = dict(zip(names, units, strict=True))
    mine = [name for stage in plan.stages_of(dist.get_rank()) for name in stage.unit_names]
    model = cast(LanguageModel, SleepingModel({name: costs[name] for name in mine}))
    # A sleeping model does not look at its batch.
    return our_step(plan, model, HIDDEN_SHAPE, cast(Sequence[MicroBatch], [None] * plan.micro_batches))


def peer_step(
    name: str, layers: Sequence[UnitCost], borders: Borders, num_ranks: int, micro_batches: int
) -> Callable[[], object]:
    package, schedule = name.split()
    layers = at_stage_ends(layers, borders)
    if package == "torch":
        stage_to_rank = line(num_ranks) if schedule == "1F1B" else vee(num_ranks)
        return torch_pipeline(schedule, layers, borders, stage_to_rank, micro_batches)
    engine = deepspeed_engine(
        deepspeed_layers(layers),
        # The second use of the embedding is a layer of its own, right before the head.
        (*borders[:-1], borders[-1] + 1),
        num_ranks,
        micro_batches,
        rows=1,
        dual_pipe_v=schedule == "DualPipeVModule",
    )
    return train_batch(engine, [torch.zeros(1, 1, dtype=torch.int64)] * micro_batches)


def deepspeed_layers(costs: Sequence[UnitCost]) -> list[Any]:
    *layers, head = [LayerSpec(kind, cost) for kind, cost in layer_modules(costs, 1, len(costs))]
    embed, lookup = (
        TiedLayerSpec(EMBED, SleepingEmbedding, costs[0], forward_fn=use, tied_weight_attr="table")
        for use in (None, add_embedding)
    )
    return [embed, *layers, lookup, head]
