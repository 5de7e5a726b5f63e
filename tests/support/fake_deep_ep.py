"""What DeepSpeed asks of the ``deep_ep`` package, on any device and by collectives of objects: for tests, not for speed.

``ElasticBuffer`` follows DeepEP's in the expanding layout: a token arrives once per chosen expert of the rank, rows of one
expert are contiguous but otherwise in any order, routing weights travel along, and combine sums a token's rows without
weighting them. It also checks what DeepEP's kernels take for granted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64
padding = 0
"""Rows of NaN after those that arrived, as buffers for the worst case have."""


@dataclass
class Handle:
    """``origins``: rank, token and slot from which each row came."""

    topk_idx: Tensor
    origins: list[tuple[int, int, int]]
    psum_num_recv_tokens_per_expert: Tensor
    do_expand: bool = True

    @property
    def num_expanded_tokens(self) -> int:
        return len(self.origins)


class ElasticBuffer:
    def __init__(self, group: dist.ProcessGroup, num_max_tokens_per_rank: int, hidden: int, num_topk: int, **_: Any):
        self.group, self.hidden, self.top_k = group, hidden, num_topk
        self.num_max_tokens_per_rank = num_max_tokens_per_rank

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        expert_alignment: int = 1,
        num_sms: int = 0,
        handle: Handle | None = None,
        do_expand: bool = False,
    ) -> tuple[Tensor, None, Tensor | None, Handle, None]:
        assert do_expand, "rows by expert were not asked for"
        assert expert_alignment == 1, f"expert_alignment={expert_alignment} would leave gaps between experts"
        assert x.is_contiguous(), "rows are not contiguous"
        assert x.shape[1] == self.hidden, f"{x.shape[1]} columns for a buffer of {self.hidden}"
        assert len(x) <= self.num_max_tokens_per_rank, f"{len(x)} tokens for a buffer of {self.num_max_tokens_per_rank}"
        if handle is None:
            assert topk_idx is not None
            assert num_experts is not None
            assert topk_idx.shape == (len(x), self.top_k), f"{topk_idx.shape} choices for {len(x)} x {self.top_k}"
            handle = self._route(topk_idx, num_experts)
        else:
            assert topk_idx is None, "a handle has its own routing"
        assert topk_weights is None or topk_weights.dtype == torch.float32, f"{topk_weights.dtype} weights"
        everything = self._gather((x, topk_weights))
        received = x.new_full((handle.num_expanded_tokens + padding, self.hidden), torch.nan)
        weights = None if topk_weights is None else topk_weights.new_full((len(received),), torch.nan)
        for place, (rank, token, slot) in enumerate(handle.origins):
            received[place] = everything[rank][0][token]
            if weights is not None:
                weights[place] = everything[rank][1][token, slot]
        return received, None, weights, handle, None

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, num_sms: int = 0
    ) -> tuple[Tensor, Tensor | None, None]:
        arrived = handle.num_expanded_tokens
        assert len(x) in (arrived, arrived + padding), f"{len(x)} rows, of which {arrived} arrived"
        assert topk_weights is None or topk_weights.shape == (len(x),), f"weights {topk_weights.shape} of {len(x)} rows"
        combined = torch.zeros(len(handle.topk_idx), self.hidden)
        combined_weights = None if topk_weights is None else torch.zeros(handle.topk_idx.shape)
        for origins, rows, weights in self._gather((handle.origins, x, topk_weights)):
            for place, (rank, token, slot) in enumerate(origins):
                if rank == dist.get_rank(self.group):
                    combined[token] += rows[place]
                    if combined_weights is not None:
                        combined_weights[token, slot] = weights[place]
        return combined.to(x.dtype), combined_weights, None

    def destroy(self) -> None:
        """Nothing is reserved."""

    def _route(self, topk_idx: Tensor, num_experts: int) -> Handle:
        held = num_experts // dist.get_world_size(self.group)
        rows: list[list[tuple[int, int, int]]] = [[] for _ in range(num_experts)]
        for rank, ids in enumerate(self._gather(topk_idx)):
            for token, choices in enumerate(ids.tolist()):
                for slot, expert in enumerate(choices):
                    rows[expert].append((rank, token, slot))
        first = dist.get_rank(self.group) * held
        mine = rows[first : first + held]
        for origins in mine:
            random.shuffle(origins)
        ends = torch.tensor([len(origins) for origins in mine]).cumsum(0).to(torch.int32)
        return Handle(topk_idx.clone(), [origin for origins in mine for origin in origins], ends)

    def _gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered
