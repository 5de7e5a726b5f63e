"""Memory of a rank: weights, gradients, optimizer state and activations, as training under DeepSpeed's ZeRO-1 keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from dist_mtp.config import Config
from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.pipeline.saved import bytes_per_element

GRADIENT_BYTES = 4
"""Of one parameter. Under bf16 too: ``BF16_Optimizer`` of DeepSpeed 0.19.8 accumulates in fp32, unsharded."""
_OPTIMIZER_BYTES = {"fp32": 4 + 2 * 4, "bf16": 4 + 2 * 2}
"""Of one parameter by ``optim.moment_dtype``: fp32 master weight and two moments. ZeRO-1 keeps a master weight even where
weights are fp32."""
_FP8_BYTES = 2
"""Of one parameter of a layer that multiplies in FP8: its copies in E4M3 for the forward and, transposed, for the backward.
The emulation makes do with one; scales are 4 bytes for 16,384 parameters."""


@dataclass(frozen=True)
class RankMemory:
    """What each data-parallel rank of one pipeline rank holds throughout a step.

    Buffers that exist for a moment (of reductions, all-to-alls and logits) and the few elements by which DeepSpeed aligns
    its partitions are not counted.
    """

    rank: int
    """Pipeline rank."""
    dense_params: int
    """Parameters that all of its data-parallel ranks hold; the embedding's replica included."""
    expert_params: int
    """Parameters of the routed experts on one data-parallel rank."""
    weight_bytes: int
    """FP8 copies included."""
    gradient_bytes: int
    optimizer_bytes: int
    """Of dense parameters a share of 1 / dp, of experts 1 / copies, where copies = dp / ep."""
    activation_bytes: int
    """Most at any time of the predicted step."""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def rank_memory(config: Config, rank: int, cost: UnitCost, activation_bytes: int) -> RankMemory:
    """Memory of a pipeline rank whose stages cost ``cost`` together."""
    dense, copies = cost.params - cost.expert_params, config.dp // config.parallel.ep
    # Rounded up: the largest share.
    optimized = -(-dense // config.dp) + -(-cost.expert_params // copies)
    in_fp8 = cost.fp8_params if config.precision.name == "fp8" else 0
    return RankMemory(
        rank=rank,
        dense_params=dense,
        expert_params=cost.expert_params,
        weight_bytes=bytes_per_element(config) * cost.params + _FP8_BYTES * in_fp8,
        gradient_bytes=GRADIENT_BYTES * cost.params,
        optimizer_bytes=_OPTIMIZER_BYTES[config.optim.moment_dtype] * optimized,
        activation_bytes=activation_bytes,
    )
