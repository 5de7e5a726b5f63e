"""SwiGLU feed-forward layer (arXiv 2002.05202): dense layers and shared experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_mtp.precision.linear import Linear


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``. Keeps its two inputs for the backward, where autograd would keep ``silu(gate)``, too."""
    result: Tensor = _SwiGlu.apply(gate, up)
    return result


def fused_swiglu(gate_up: Tensor) -> Tensor:
    """The same from ``gate`` and ``up`` side by side, [..., 2 I] -> [..., I]; their gradients are made side by side, too."""
    result: Tensor = _FusedSwiGlu.apply(gate_up)
    return result


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _write_gradients(grads[0], gate, up, grad_gate, grad_up)
        return grad_gate, grad_up


class _FusedSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad_gate_up = torch.empty_like(gate_up)
        _write_gradients(grads[0], *gate_up.chunk(2, dim=-1), *grad_gate_up.chunk(2, dim=-1))
        return grad_gate_up


def _write_gradients(grad_y: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    torch.mul(grad_y, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_y * up, gate, grad_input=grad_gate)
