"""What sleeping contenders pretend to train: DeepSeek-V3 with one MTP module on H100s, as the planner sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dist_mtp.cli.compose import compose
from dist_mtp.config import Config, resolve
from dist_mtp.pipeline.costs import UnitCost

VOCAB_SIZE = 129280
OVERRIDES = (
    "model=deepseek_v3",
    "mtp.depth=1",
    "precision=bf16",
    "tokenizer=bpe",
    "pipeline.device_profile=h100",
    "pipeline.recompute=none",
    "pipeline.memory_gb=1000000",
    "parallel.dp=1",
    "train.seq_len=4096",
    "train.micro_batch_size=1",
)


def make_config(num_ranks: int, micro_batches: int, schedule: str) -> Config:
    sizes = (f"parallel.pp={num_ranks}", f"train.micro_batches={micro_batches}", f"pipeline.schedule={schedule}")
    return resolve(compose([*OVERRIDES, *sizes]), vocab_size=VOCAB_SIZE, world_size=num_ranks)


def scaled(costs: Sequence[UnitCost], scale: float) -> list[UnitCost]:
    return [
        dataclasses.replace(c, time_f=scale * c.time_f, time_i=scale * c.time_i, time_w=scale * c.time_w) for c in costs
    ]
