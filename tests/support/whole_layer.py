"""What ranks that share experts wrote down (``support.expert_worlds``), against a rank with all experts of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from support.expert_worlds import WORLD_SIZE
from torch import Tensor

FP32_BOUND = 1e-6
"""Relative difference in the 2-norm over all ranks: fp32 sums in another order."""
BF16_BOUND = 2**-7
"""The same where gradients are sums of numbers that were rounded to bf16, each by at most 2^-9 of itself."""
RANKS = range(WORLD_SIZE)


def group_of(rank: int, ep: int) -> range:
    """Ranks that share experts with ``rank``, itself included."""
    return range(rank // ep * ep, rank // ep * ep + ep)


def expected_tensor(results: list[dict[str, Any]], name: str, rank: int, ep: int) -> Tensor:
    """What ``rank`` should find, from the ranks' whole layers: for an expert's weight the sum over its group's ranks."""
    if not name.startswith("experts."):
        return results[rank]["whole"][name].double()
    summed = torch.stack([results[other]["whole"][name].double() for other in group_of(rank, ep)]).sum(dim=0)
    return summed.chunk(ep)[rank % ep]


def relative_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Of the 2-norm over all ranks' (found, expected)."""
    found, expected = (torch.cat([each.double().flatten() for each in side]) for side in zip(*pairs, strict=True))
    assert expected.any(), "all zeros: nothing is compared"
    return float((found - expected).norm() / expected.norm())


def assert_equals_whole_layer(results: list[dict[str, Any]], ep: int, bound: float) -> None:
    for name in results[0]["whole"]:
        pairs = [(results[rank][f"ep {ep}"][name], expected_tensor(results, name, rank, ep)) for rank in RANKS]
        difference = relative_difference(pairs)
        assert difference <= bound, f"{name}: relative difference {difference}, bound {bound}"
