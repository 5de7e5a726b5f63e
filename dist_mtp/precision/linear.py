"""The linear layer of attention, feed-forward and MTP projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_mtp.precision.fp8.linear import fp8_linear
from dist_mtp.precision.weight_grads import DeferrableLayer


class Linear(DeferrableLayer):
    """``y = x W^T`` without bias. ``weight``: [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        if self.fp8 is not None:
            return fp8_linear(x, self.weight, self)
        result: Tensor = _Linear.apply(x, self.weight, self)
        return result

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def project(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Several layers of the same input, [..., in_features], which FP8 layers quantise, and keep for the backward, once."""
    in_fp8 = next((layer.fp8 for layer in layers if layer.fp8 is not None), None)
    if in_fp8 is None:
        return tuple(layer(x) for layer in layers)
    operand = in_fp8.quantize_input(x)
    return tuple(
        layer(x) if layer.fp8 is None else fp8_linear(x, layer.weight, layer, operand=operand) for layer in layers
    )


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
        # Detached: x knows its graph, which ends at the stage's input and would keep that until the closure has run.
        grad_rows, x_rows = grad_y.reshape(-1, grad_y.shape[-1]), x.detach().reshape(-1, x.shape[-1])
        return grad_x, layer.deliver(weight, lambda: grad_rows.t() @ x_rows), None
