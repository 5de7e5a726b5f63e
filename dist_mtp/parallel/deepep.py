"""Expert parallelism over DeepEP's kernels, in DeepSpeed's differentiable wrapping (``module_inject.auto_ep_comm``, 0.19.8)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dist_mtp.config import Config
from dist_mtp.model.dispatch import Dispatch, Routing


class DeepEPDispatcher:
    """Sends each token once per rank that holds any of its experts, and sums there what comes back to one row.

    DeepEP copies tokens to the rows of their experts on arrival and travels within its own kernels, so nothing is measured;
    it asks the host for the number of rows once per layer, as the all-to-all does.

    Rows of one expert arrive in any order, another one in each dispatch: equal runs differ by rounding, and a layer that is
    recomputed by a non-reentrant ``torch.utils.checkpoint``, which keeps the first dispatch's handle for the backward, gets
    wrong gradients. A reentrant one does not.

    Args:
        group: the ranks that share a layer's experts; rank r of R holds experts [r E/R, (r+1) E/R).
    """

    def __init__(self, config: Config, group: dist.ProcessGroup) -> None:
        from deepspeed.module_inject import auto_ep_comm

        # DeepEP joins the communicator, which NCCL creates with its first collective. A barrier of ours is gloo's.
        dist.all_reduce(torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu"), group=group)
        self.exchange = auto_ep_comm.shared_exchange(
            scope=0,
            ep_group=group,
            num_experts=config.model.n_routed_experts,
            top_k=config.model.num_experts_per_tok,
            hidden_size=config.model.hidden_size,
            num_max_tokens_per_rank=config.train.micro_batch_size * config.train.seq_len,
        )

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatch:
        return _DeepEPDispatch(self, x_TD, routing)


class _DeepEPDispatch:
    def __init__(self, dispatcher: DeepEPDispatcher, x_TD: Tensor, routing: Routing) -> None:
        from deepspeed.module_inject.auto_ep_comm import deepep_dispatch

        self._exchange = dispatcher.exchange
        rows, weights, _ = deepep_dispatch(self._exchange, x_TD, routing.ids_TK, routing.weights_TK)
        self._handle = self._exchange.last_handle
        arrived = self._handle.num_expanded_tokens  # buffers may be longer
        self._rows, self._weights = rows[:arrived], weights[:arrived]

    def receive(self) -> tuple[Tensor, Tensor]:
        return self._rows, self._handle.psum_num_recv_tokens_per_expert.to(torch.int32)

    def combine(self, rows_ND: Tensor) -> Tensor:
        from deepspeed.module_inject.auto_ep_comm import deepep_combine

        weighted = (rows_ND * self._weights.reshape(-1, 1)).to(rows_ND.dtype)
        y_TD: Tensor = deepep_combine(self._exchange, weighted, self._handle)
        return y_TD
