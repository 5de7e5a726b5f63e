"""The linear layer of attention, feed-forward and MTP projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_mtp.precision.weight_grads import DeferrableLayer, accumulate


class Linear(DeferrableLayer):
    """``y = x W^T`` without bias. ``weight``: [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        result: Tensor = _Linear.apply(x, self.weight, self)
        return result

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Linear) -> Tensor:
        ctx.save_for_backward(x)
        # The Parameter itself, not a saved tensor: activation checkpointing unpacks a copy of those, and the gradient
        # would land on the copy.
        ctx.weight, ctx.layer = weight, layer
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_y,) = grads
        (x,), weight, layer = ctx.saved_tensors, ctx.weight, ctx.layer
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        grad_rows, x_rows = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
        if layer.defers():
            layer.weight_grad_queue.put(lambda: accumulate(weight, grad_rows.t() @ x_rows))
            return grad_x, None, None
        return grad_x, grad_rows.t() @ x_rows, None
