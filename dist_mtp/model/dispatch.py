"""How tokens reach their experts: what every dispatcher promises, and the one for experts that are all on this rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens.

    ``ids_TK``: int64, chosen experts. ``weights_TK``: fp32, their weights in the sum. ``counts_E``: int64, how many of the
    T * K slots each expert of the layer got.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor


class Dispatch(Protocol):
    """The tokens of one MoE layer and microbatch, under way."""

    def receive(self) -> tuple[Tensor, Tensor]:
        """Tokens for this rank's experts: [N, D], expert by expert, and the end row of each, int32 [local experts]."""

    def combine(self, rows_ND: Tensor) -> Tensor:
        """From the results of :meth:`receive`'s rows to each token's weighted sum, [T, D], on the rank of the token."""


class Dispatcher(Protocol):
    """Carries tokens to the experts that they chose, and the results back; differentiable, and no token is dropped."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatch:
        """Let the tokens leave. What a caller computes before :meth:`Dispatch.receive` overlaps with their way."""


class Slots:
    """The T * K slots of a routing, sorted by expert: slot t*K+k is token t's k-th choice.

    With K = 2 and choices ``[[1, 0], [1, 2]]`` the rows are those of tokens ``0 | 0 1 | 1``, for experts 0, 1 and 2.
    """

    def __init__(self, routing: Routing) -> None:
        self._order = routing.ids_TK.flatten().argsort(stable=True)
        self._inverse = inverse_permutation(self._order)
        self._weights_TK = routing.weights_TK

    def rows(self, x_TD: Tensor) -> Tensor:
        """Each token once per slot, sorted by expert: [T, D] -> [T*K, D]."""
        result: Tensor = _RowsOfSlots.apply(x_TD, self._order, self._inverse, self._weights_TK.shape[1])
        return result

    def weighted_sum(self, rows: Tensor) -> Tensor:
        """The reverse: [T*K, D] sorted by expert -> each token's K rows times their weights, summed in fp32: [T, D]."""
        result: Tensor = _WeightedSum.apply(rows, self._weights_TK, self._inverse.view_as(self._weights_TK))
        return result


class _LocalDispatch:
    def __init__(self, x_TD: Tensor, routing: Routing) -> None:
        self._slots = Slots(routing)
        # Here and not in receive(): where rows travel they leave here, and gradients are summed in the same order.
        self._rows = self._slots.rows(x_TD)
        self._ends_E = routing.counts_E.cumsum(0).to(torch.int32)

    def receive(self) -> tuple[Tensor, Tensor]:
        return self._rows, self._ends_E

    def combine(self, rows_ND: Tensor) -> Tensor:
        return self._slots.weighted_sum(rows_ND)


class LocalDispatcher:
    """For a rank that holds every expert: nothing travels, rows are only sorted."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatch:
        return _LocalDispatch(x_TD, routing)


def inverse_permutation(order: Tensor) -> Tensor:
    """``inverse`` with ``inverse[order[i]] == i``; int64 [N], without a second sort."""
    places = torch.arange(order.numel(), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``rows[order]`` for a permutation and its inverse."""
    result: Tensor = _Permute.apply(rows, order, inverse)
    return result


class _Permute(torch.autograd.Function):
    """The backward gathers too, where autograd would scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse], None, None


class _RowsOfSlots(torch.autograd.Function):
    """As above, without ever holding the T*K rows in the order of tokens."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x_TD[order // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse].unflatten(0, (-1, ctx.top_k)).sum(dim=1), None, None, None


class _WeightedSum(torch.autograd.Function):
    """One choice at a time, so that nothing larger than [T, D] is ever in fp32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights_TK: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights_TK, places_TK)
        y_TD = torch.zeros(len(places_TK), rows.shape[1], dtype=weights_TK.dtype, device=rows.device)
        for places_T, weights_T in zip(places_TK.unbind(1), weights_TK.unbind(1), strict=True):
            y_TD += rows[places_T] * weights_T[:, None]
        return y_TD.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights_TK, places_TK = ctx.saved_tensors
        grad_y_TD = grads[0].to(weights_TK.dtype)
        grad_rows, grad_weights = torch.empty_like(rows), []
        for places_T, weights_T in zip(places_TK.unbind(1), weights_TK.unbind(1), strict=True):
            grad_weights.append((grad_y_TD * rows[places_T]).sum(dim=1))
            grad_rows[places_T] = (grad_y_TD * weights_T[:, None]).to(rows.dtype)  # each row is one choice of one token
        return grad_rows, torch.stack(grad_weights, dim=1), None
