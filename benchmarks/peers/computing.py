"""The ranks of ``pipeline_peers.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_mtp.batches import MicroBatches
from dist_mtp.config import Config, from_mapping
from dist_mtp.data.batch import Batch
from dist_mtp.model.init import initialize
from dist_mtp.model.targets import count_targets, loss_coefficients
from dist_mtp.model.transformer import LanguageModel
from dist_mtp.parallel.mesh import init_process_group
from dist_mtp.pipeline.plan import make_plan
from dist_mtp.signals import end_with_parent
from peers.cuts import Borders
from peers.deepspeed_pipelines import deepspeed_engine, train_batch
from peers.layers import deepspeed_layers, parameter_name
from peers.measuring import Contender, interleaved
from peers.ours import our_step

STEP_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Pipeline:
    """This rank's part of a pipeline that computes. ``parameters`` go by dist_mtp's names."""

    name: str
    step: Callable[[], object]
    parameters: dict[str, nn.Parameter]

    def clear(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}


def run_rank(folder: Path) -> None:
    """Time the contenders of ``folder/spec.json`` in turn; leaves seconds, and gradients of the last step by rank."""
    end_with_parent()
    torch.set_num_threads(1)
    init_process_group(timeout_s=2 * STEP_TIMEOUT_S, device="cpu")
    spec = json.loads((folder / "spec.json").read_text())
    pipelines = [ours(name, from_mapping(config)) for name, config in spec["ours"].items()]
    config = from_mapping(next(iter(spec["ours"].values())))
    pipelines += [peer(name, config, tuple(borders)) for name, borders in spec["peers"].items()]
    contenders = [Contender(p.name, p.step, p.clear) for p in pipelines]
    seconds = interleaved(contenders, spec["rounds"], STEP_TIMEOUT_S)
    rank = dist.get_rank()
    for pipeline in pipelines:
        save_file(pipeline.gradients(), folder / f"{pipeline.name}.{rank}.safetensors")
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def ours(name: str, config: Config) -> Pipeline:
    """The plan of ``config``, executed by dist_mtp's stages and runtime."""
    plan, rank = make_plan(config), dist.get_rank()
    model = LanguageModel(config, {unit for stage in plan.stages_of(rank) for unit in stage.unit_names})
    initialize(model, seed=config.train.seed, std=config.model.initializer_range)
    train, batch = config.train, make_batch(config)
    batches = MicroBatches(batch.microbatches(train.micro_batches), coefficients_of(config, batch), config)
    hidden_shape = (train.micro_batch_size, train.seq_len, config.model.hidden_size)
    return Pipeline(name, our_step(plan, model, hidden_shape, batches), dict(model.named_parameters()))


def peer(name: str, config: Config, borders: Borders) -> Pipeline:
    """DeepSpeed's pipeline of this name, over the same modules, weights and rows."""
    batch, train = make_batch(config), config.train
    engine = deepspeed_engine(
        deepspeed_layers(config, coefficients_of(config, batch)),
        # The second use of the embedding is a layer of its own, right before the head.
        (*borders[:-1], borders[-1] + 1),
        config.parallel.pp,
        train.micro_batches,
        rows=train.micro_batch_size,
        dual_pipe_v="DualPipeV" in name,
        updates=False,
    )
    parts = batch.microbatches(train.micro_batches)
    step = train_batch(engine, [torch.stack((part.input_ids, part.document_ids), dim=1) for part in parts])
    return Pipeline(name, step, {parameter_name(name): p for name, p in engine.module.named_parameters()})


def make_batch(config: Config) -> Batch:
    """Random ids; every row is two documents, of different lengths."""
    generator = torch.Generator().manual_seed(config.train.seed)
    shape = (config.rows_per_step, config.row_length)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    second_starts = torch.randint(1, config.row_length, (shape[0], 1), generator=generator)
    return Batch(ids, (torch.arange(config.row_length) >= second_starts).to(torch.int64))


def coefficients_of(config: Config, batch: Batch) -> list[float]:
    counts = count_targets(batch.document_ids, config.train.seq_len, config.mtp.depth).tolist()
    return loss_coefficients(counts, config.mtp, config.mtp.loss_weight, config.tokens_per_step)
