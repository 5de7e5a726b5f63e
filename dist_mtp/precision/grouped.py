"""The linear layer of experts: one weight per expert, rows sorted by expert, all products in one call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mtp.precision.weight_grads import DeferrableLayer


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, layer: DeferrableLayer) -> Tensor:
    """``y[rows of e] = x[rows of e] @ weight[e]^T``.

    Args:
        x: [N, in], rows of one expert contiguous, experts in order.
        weight: [E, out, in].
        ends: int32 [E], end row of each expert's rows (running sum of counts); experts may be empty.
        layer: owner of ``weight``, which says whether weight gradients are withheld.

    Returns:
        [N, out].
    """
    result: Tensor = _GroupedLinear.apply(x, weight, ends, layer)
    return result


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, layer: DeferrableLayer) -> Tensor:
        ctx.save_for_backward(x, ends)
        ctx.weight, ctx.layer = weight, layer  # the Parameter itself, as in linear.py
        return rows_times_weights(x, weight.transpose(-2, -1), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_y = grads[0].contiguous()  # the kernel refuses expanded gradients
        (x, ends), weight, layer = ctx.saved_tensors, ctx.weight, ctx.layer
        grad_x = rows_times_weights(grad_y, weight, ends) if ctx.needs_input_grad[0] else None
        x_rows = x.detach()  # without its graph, as in linear.py
        return grad_x, layer.deliver(weight, lambda: weight_grad(grad_y, x_rows, ends)), None, None


def rows_times_weights(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """rows [N, k], weights [E, k, m] -> [N, m]."""
    if rows.shape[0] == 0:
        return rows.new_empty(0, weights.shape[2])
    if _has_kernel(rows, weights):
        return F.grouped_mm(rows, weights, offs=ends)
    out = rows.new_empty(rows.shape[0], weights.shape[2])
    for expert, (start, end) in enumerate(_ranges(ends)):
        torch.mm(rows[start:end], weights[expert], out=out[start:end])
    return out


def weight_grad(grad_y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """grad_y [N, out], x [N, in] -> [E, out, in]; zeros for an expert without rows."""
    if x.shape[0] == 0:
        return x.new_zeros(ends.shape[0], grad_y.shape[1], x.shape[1])
    if _has_kernel(grad_y, x):
        grad = F.grouped_mm(grad_y.t(), x, offs=ends)
        return _zero_without_rows(grad, ends) if _kernel_skips_empty_sums(x.device) else grad
    out = x.new_empty(ends.shape[0], grad_y.shape[1], x.shape[1])
    for expert, (start, end) in enumerate(_ranges(ends)):
        torch.mm(grad_y[start:end].t(), x[start:end], out=out[expert])
    return out


def _has_kernel(a: Tensor, b: Tensor) -> bool:
    """Whether ``F.grouped_mm`` takes these two; what it refuses goes through a loop over experts.

    It refuses float64, which only checks use, and strides and (on GPUs) addresses that are no multiples of 16 bytes:
    ``check_valid_strides_and_return_transposed`` in torch's ATen/native/GroupedMMUtils.h. One kernel serves bf16 on GPUs
    of compute capability 9 and 10. Everything else that it takes, fp32 on GPUs included, is a loop inside of the call, which
    on GPUs reads ``ends`` back (``_grouped_mm_fallback`` in the same file).
    """
    widths_fit = all(size * a.element_size() % 16 == 0 for size in (*a.shape[1:], *b.shape[1:]))
    addresses_fit = a.is_cpu or (a.data_ptr() % 16 == 0 and b.data_ptr() % 16 == 0)
    return a.dtype in (torch.float32, torch.bfloat16) and widths_fit and addresses_fit


def _kernel_skips_empty_sums(device: torch.device) -> bool:
    """Whether a sum over no rows may come out as whatever was there instead of 0.

    So on Blackwell (compute capability 10), up to torch 2.13 at least: https://github.com/pytorch/pytorch/issues/172439.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def _zero_without_rows(grad: Tensor, ends: Tensor) -> Tensor:
    """Zero the entries of [E, ...] whose expert has no rows, without asking the device which."""
    empty_E = ends.diff(prepend=ends.new_zeros(1)) == 0
    return grad.masked_fill_(empty_E[:, None, None], 0)


def _ranges(ends: Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))
