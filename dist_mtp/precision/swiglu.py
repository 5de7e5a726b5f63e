"""SwiGLU, ``silu(gate) * up`` (arXiv 2002.05202). Keeps its inputs for the backward, where autograd would keep ``silu(gate)``, too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: [..., I] -> [..., I]."""
    result: Tensor = _SwiGlu.apply(gate, up)
    return result


def fused_swiglu(gate_up: Tensor) -> Tensor:
    """The same from ``gate`` and ``up`` side by side, [..., 2 I] -> [..., I]; their gradients are made side by side, too."""
    result: Tensor = _FusedSwiGlu.apply(gate_up)
    return result


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """The function itself, for use inside of autograd functions."""
    return F.silu(gate) * up


def swiglu_gradients(grad_y: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    """Write the gradients of both inputs into ``grad_gate`` and ``grad_up``."""
    torch.mul(grad_y, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_y * up, gate, grad_input=grad_gate)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        swiglu_gradients(grads[0], gate, up, grad_gate, grad_up)
        return grad_gate, grad_up


class _FusedSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_forward(*gate_up.chunk(2, dim=-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad_gate_up = torch.empty_like(gate_up)
        swiglu_gradients(grads[0], *gate_up.chunk(2, dim=-1), *grad_gate_up.chunk(2, dim=-1))
        return grad_gate_up
