"""DeepSeek-V3 as all parts of ``planning.py`` plan it."""

from __future__ import annotations

from peers.workload import OVERRIDES, VOCAB_SIZE

from dist_mtp.cli.compose import compose
from dist_mtp.config import Config, resolve

MEMORY_GB = 1_000_000
"""So much that no plan is cut to fit: what is compared is time at the same activations."""


def v3_config(num_ranks: int, micro_batches: int, *overrides: str, dp: int = 1) -> Config:
    """DeepSeek-V3 on H100s, one row of 4096 tokens per microbatch, bf16, one MTP module unless overridden."""
    sizes = (f"parallel.pp={num_ranks}", f"train.micro_batches={micro_batches}", f"parallel.dp={dp}")
    composed = compose([*OVERRIDES, *sizes, f"pipeline.memory_gb={MEMORY_GB}", *overrides])
    return resolve(composed, vocab_size=VOCAB_SIZE, world_size=num_ranks * dp)
