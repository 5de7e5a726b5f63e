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
from dist_mtp.precision.fp8.backend import Fp8Backend
from dist_mtp.precision.fp8.packed import pack, unpack


def make_dispatcher(config: Config, mesh: Mesh, fp8: Fp8Backend | None = None) -> Dispatcher:
    """The dispatcher that ``moe.dispatcher`` names, or the local one where ranks share no experts.

    Args:
        fp8: what quantises, for ``precision.fp8_dispatch``.

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
    return AllToAllDispatcher(mesh.expert_group, fp8 if config.precision.fp8_dispatch else None)


class AllToAllDispatcher:
    """Sends each token once per chosen expert, with the sizes that the routing happens to have: none is dropped.

    Every rank of the group must call it for the same layers and microbatches in the same order, with any number of tokens.

    Args:
        group: the ranks that share a layer's experts; rank r of R holds experts [r E/R, (r+1) E/R).
        fp8: send what goes to experts, tokens in the forward and gradients in the backward, in FP8 with scales that are
            powers of two; what comes from them keeps its precision (arXiv 2412.19437, section 3.3.3).
    """

    def __init__(self, group: dist.ProcessGroup, fp8: Fp8Backend | None = None) -> None:
        self.group, self.fp8 = group, fp8
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
        self._outward = Exchange(dispatcher, self._sent, self._received, fp8_forward=dispatcher.fp8)
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
        homeward = Exchange(self._dispatcher, self._received, self._sent, fp8_backward=self._dispatcher.fp8)
        rows = homeward.start(permute(rows_ND, self._inverse, self._order))
        return self._slots.weighted_sum(homeward.finish(rows))


class Exchange:
    """One all-to-all and, in the backward, its reverse. Between start and finish the rows travel, in both directions.

    Autograd runs backward functions in the reverse order of their forwards: :meth:`finish` starts the gradients' way,
    :meth:`start` ends it, and what was computed between the two in the forward has its backward between them, too.

    Args:
        sent, received: rows for and from each rank of the group.
        fp8_forward, fp8_backward: what packs rows into FP8 for their way in this direction.
    """

    def __init__(
        self,
        dispatcher: AllToAllDispatcher,
        sent: Sequence[int],
        received: Sequence[int],
        *,
        fp8_forward: Fp8Backend | None = None,
        fp8_backward: Fp8Backend | None = None,
    ) -> None:
        self._group, self._traffic = dispatcher.group, dispatcher.traffic
        self.sent, self.received = list(sent), list(received)
        self.fp8_forward, self.fp8_backward = fp8_forward, fp8_backward
        self._travelling: tuple[dist.Work | None, Tensor, Tensor] | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Rows sorted by destination leave. The result is filled when :meth:`finish` has returned it, not before."""
        result: Tensor = _Start.apply(rows, self)
        return result

    def finish(self, rows: Tensor) -> Tensor:
        """Wait for the result of :meth:`start`."""
        result: Tensor = _Finish.apply(rows, self)
        return result

    def launch(self, rows: Tensor, sent: list[int], received: list[int], fp8: Fp8Backend | None) -> Tensor:
        result = rows.new_empty(sum(received), rows.shape[1])
        leaving = rows.contiguous() if fp8 is None else pack(fp8.quantize_rows(rows, power_of_two=True))
        arriving = result if fp8 is None else leaving.new_empty(len(result), leaving.shape[1])
        work = dist.all_to_all_single(arriving, leaving, received, sent, group=self._group, async_op=True)
        others = sum(sent) - sent[dist.get_rank(self._group)]
        self._traffic.sent_bytes += others * leaving.shape[1] * leaving.element_size()
        self._travelling = work, arriving, result
        return result

    def wait(self) -> Tensor:
        assert self._travelling is not None, "launch() comes first"
        (work, arrived, result), self._travelling = self._travelling, None
        self._traffic.wait(work, arrived.device)
        if arrived is not result:
            result.copy_(unpack(arrived, result.shape[1]).dequantize())
        return result


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.launch(rows, exchange.sent, exchange.received, exchange.fp8_forward)

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
        exchange.launch(grads[0], exchange.received, exchange.sent, exchange.fp8_backward)
        # Autograd wants a gradient of this function's input shape; the real one is on its way to _Start.
        return grads[0], None
