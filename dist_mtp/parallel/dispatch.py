"""Expert parallelism: tokens travel to the ranks of their experts and back by all-to-all collectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_mtp.config import Config
from dist_mtp.errors import ConfigError
from dist_mtp.model.dispatch import Dispatch, Dispatcher, LocalDispatcher, Routing, Slots, inverse_permutation, permute
from dist_mtp.parallel.mesh import Mesh
from dist_mtp.parallel.traffic import Traffic


def make_dispatcher(config: Config, mesh: Mesh) -> Dispatcher:
    """The dispatcher that ``moe.dispatcher`` names, or the local one where ranks share no experts.

    Raises:
        ConfigError: ``deepep`` without a GPU.
    """
    if mesh.expert_group is None:
        return LocalDispatcher()
    if config.moe.dispatcher == "deepep":
        if mesh.device.type != "cuda":
            raise ConfigError(
                "moe.dispatcher=deepep moves tokens between GPUs, but this run trains on the CPU: use moe.dispatcher=alltoall"
            )
        from dist_mtp.parallel.deepep import DeepEPDispatcher

        return DeepEPDispatcher(config, mesh.expert_group)
    return AllToAllDispatcher(mesh.expert_group)


class AllToAllDispatcher:
    """Sends each token once per chosen expert, with the sizes that the routing happens to have: none is dropped.

    Every rank of the group must call it for the same layers and microbatches in the same order, with any number of tokens.

    Args:
        group: the ranks that share a layer's experts; rank r of R holds experts [r E/R, (r+1) E/R).
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.traffic = Traffic()

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatch:
        return _AllToAllDispatch(self, x_TD, routing)


class _AllToAllDispatch:
    def __init__(self, dispatcher: AllToAllDispatcher, x_TD: Tensor, routing: Routing) -> None:
        self._dispatcher = dispatcher
        ranks = dist.get_world_size(dispatcher.group)
        # Sorted by expert is sorted by rank, as a rank's experts are consecutive.
        self._slots = Slots(routing)
        sent_RE = routing.counts_E.view(ranks, -1)
        self._received_RE = torch.empty_like(sent_RE)
        sizes = dist.all_to_all_single(self._received_RE, sent_RE, group=dispatcher.group, async_op=True)
        rows = self._slots.rows(x_TD)  # meanwhile
        dispatcher.traffic.wait(sizes, x_TD.device)
        # The collective wants its sizes on the host: one copy per layer, whatever the number of experts.
        self._sent, self._received = torch.stack((sent_RE.sum(dim=1), self._received_RE.sum(dim=1))).tolist()
        self._outward = Exchange(dispatcher, self._sent, self._received)
        self._arriving = self._outward.start(rows)

    def receive(self) -> tuple[Tensor, Tensor]:
        rows = self._outward.finish(self._arriving)
        # They come by rank, and by expert within a rank; a stable sort by expert makes each expert's rows contiguous.
        experts_RE = torch.arange(self._received_RE.shape[1], device=rows.device).expand_as(self._received_RE)
        counts = self._received_RE.flatten()
        experts_N = experts_RE.flatten().repeat_interleave(counts, output_size=rows.shape[0])
        self._order = experts_N.argsort(stable=True)
        self._inverse = inverse_permutation(self._order)
        ends_E = self._received_RE.sum(dim=0).cumsum(0).to(torch.int32)
        return permute(rows, self._order, self._inverse), ends_E

    def combine(self, rows_ND: Tensor) -> Tensor:
        homeward = Exchange(self._dispatcher, self._received, self._sent)
        rows = homeward.start(permute(rows_ND, self._inverse, self._order))
        return self._slots.weighted_sum(homeward.finish(rows))


class Exchange:
    """One all-to-all and, in the backward, its reverse. Between start and finish the rows travel, in both directions.

    Autograd runs backward functions in the reverse order of their forwards: :meth:`finish` starts the gradients' way,
    :meth:`start` ends it, and what was computed between the two in the forward has its backward between them, too.

    Args:
        sent, received: rows for and from each rank of the group.
    """

    def __init__(self, dispatcher: AllToAllDispatcher, sent: Sequence[int], received: Sequence[int]) -> None:
        self._group, self._traffic = dispatcher.group, dispatcher.traffic
        self.sent, self.received = list(sent), list(received)
        self._travelling: tuple[dist.Work | None, Tensor] | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Rows sorted by destination leave. The result is filled when :meth:`finish` has returned it, not before."""
        result: Tensor = _Start.apply(rows, self)
        return result

    def finish(self, rows: Tensor) -> Tensor:
        """Wait for the result of :meth:`start`."""
        result: Tensor = _Finish.apply(rows, self)
        return result

    def launch(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(received), rows.shape[1])
        work = dist.all_to_all_single(arriving, rows, received, sent, group=self._group, async_op=True)
        others = sum(sent) - sent[dist.get_rank(self._group)]
        self._traffic.sent_bytes += others * rows.shape[1] * rows.element_size()
        self._travelling = work, arriving
        return arriving

    def wait(self) -> Tensor:
        assert self._travelling is not None, "launch() comes first"
        (work, arrived), self._travelling = self._travelling, None
        self._traffic.wait(work, arrived.device)
        return arrived


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.launch(rows, exchange.sent, exchange.received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # What comes in is a placeholder, see below.
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange: Exchange = ctx.exchange
        exchange.launch(grads[0], exchange.received, exchange.sent)
        # Autograd wants a gradient of this function's input shape; the real one is on its way to _Start.
        return grads[0], None
