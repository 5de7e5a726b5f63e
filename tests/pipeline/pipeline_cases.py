"""Placements, schedules and models that several test files of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

from dist_mtp.config import Config, ModelConfig, MtpConfig, ParallelConfig, PipelineConfig, PrecisionConfig, TrainConfig
from dist_mtp.pipeline import schedules
from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.pipeline.table import Table

DEEPSEEK_V3 = ModelConfig(
    name="deepseek_v3",
    vocab_size=129280,
    hidden_size=7168,
    num_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    first_k_dense_replace=3,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    n_group=8,
    topk_group=4,
    max_position_embeddings=4096,
)


def v3_config(depth: int = 1, pp: int = 8, micro_batches: int = 32, **pipeline: str | float) -> Config:
    """DeepSeek-V3 with D MTP modules on H100s, T = 4096, one row per microbatch."""
    return Config(
        model=DEEPSEEK_V3,
        mtp=MtpConfig(depth=depth),
        parallel=ParallelConfig(pp=pp),
        pipeline=PipelineConfig(device_profile="h100", **pipeline),  # type: ignore[arg-type]
        train=TrainConfig(micro_batch_size=1, micro_batches=micro_batches, seq_len=4096),
        precision=PrecisionConfig(name="bf16"),
    )


def tiny_config(pp: int = 2, micro_batches: int = 8, depth: int = 1, **pipeline: str) -> Config:
    """The default model, large enough for P = 4."""
    return Config(
        model=ModelConfig(vocab_size=257),
        mtp=MtpConfig(depth=depth),
        parallel=ParallelConfig(pp=pp),
        pipeline=PipelineConfig(**pipeline),  # type: ignore[arg-type]
        train=TrainConfig(micro_batches=micro_batches),
    )


def v_ranks(num_ranks: int) -> tuple[int, ...]:
    return (*range(num_ranks), *reversed(range(num_ranks)))


def all_tables(max_ranks: int, max_micro_batches: int) -> Iterator[tuple[str, Table, tuple[int, ...], int]]:
    """Every schedule on every placement it supports: (label, table, rank of each stage, microbatches)."""
    for num_ranks in range(1, max_ranks + 1):
        line = tuple(range(num_ranks))
        for micro_batches in range(1, max_micro_batches + 1):
            cases = [("gpipe", v_ranks(num_ranks)), ("gpipe", line), ("1f1b", line), ("zbv", v_ranks(num_ranks))]
            if micro_batches >= 2 * num_ranks:
                cases.append(("dualpipev", v_ranks(num_ranks)))
            if micro_batches % max(1, micro_batches // num_ranks) == 0:
                cases.extend(("interleaved_1f1b", line * stages) for stages in (1, 2, 3))
            for name, ranks in cases:
                label = f"{name}, P={num_ranks}, M={micro_batches}, stages={len(ranks)}"
                yield label, schedules.build(name, num_ranks, ranks, micro_batches), ranks, micro_batches


def equal_stages(count: int, f: float = 1.0, i: float = 1.0, w: float = 1.0) -> list[UnitCost]:
    return [
        UnitCost(time_f=f, time_i=i, time_w=w, params=1, activation_bytes=1, deferred_bytes=1) for _ in range(count)
    ]
