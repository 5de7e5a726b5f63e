"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_mtp.precision.weight_grads import hand_over


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in fp32, or unchanged when it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in fp32 and rounded once.

    A bf16 ``weight`` may carry an ``fp32_copy``, which is used instead.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return result


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row; autograd would keep three fp32 tensors of the input's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = at_least_fp32(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale)
        ctx.weight = weight  # the Parameter itself: it carries main_grad
        return (_exact(weight) * (wide * scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x, scale), weight = ctx.saved_tensors, ctx.weight
        normed = at_least_fp32(x) * scale
        grad_y = at_least_fp32(grads[0])
        grad_weight = (grad_y * normed).flatten(0, -2).sum(0)
        grad_normed = grad_y * _exact(weight)
        grad_x = (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True)) * scale
        return grad_x.to(x.dtype), hand_over(weight, grad_weight), None


def _exact(weight: Tensor) -> Tensor:
    return getattr(weight, "fp32_copy", weight)
