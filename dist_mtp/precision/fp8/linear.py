"""FP8 linears as autograd functions, dense or of experts, alone or behind a SwiGLU.

Kept for the backward: the input in column tiles for the weight gradient, one byte a value, which two layers of one input
share; behind a SwiGLU not its output but its two inputs, in row tiles, from which it is computed again (arXiv 2412.19437,
section 3.3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_mtp.precision.fp8.layer import Fp8Layer, Operand
from dist_mtp.precision.fp8.tiles import Quantized, RowTiles
from dist_mtp.precision.swiglu import swiglu_forward, swiglu_gradients
from dist_mtp.precision.weight_grads import DeferrableLayer


def fp8_linear(
    x: Tensor, weight: Tensor, layer: DeferrableLayer, tiles: RowTiles | None = None, *, operand: Operand | None = None
) -> Tensor:
    """``x @ weight^T`` in FP8.

    Args:
        x: [.., in]; rows sorted by expert if there are ``tiles``.
        weight: [out, in], or [E, out, in] with ``tiles``; a parameter of ``layer``.
        operand: ``x`` already quantised.

    Returns:
        [.., out] in the precision of ``x``.
    """
    if operand is None:
        operand = _fp8(layer).quantize_input(x, tiles)
    result: Tensor = _Fp8Linear.apply(x, weight, layer, tiles, operand)
    return result


def fp8_swiglu_linear(
    gate_up: tuple[Tensor, ...], weight: Tensor, layer: DeferrableLayer, tiles: RowTiles | None = None
) -> Tensor:
    """``(silu(gate) * up) @ weight^T`` in FP8.

    Args:
        gate_up: gate and up, [.., in] each, or one tensor with both side by side, [.., 2 in].
        weight, tiles: as in :func:`fp8_linear`.
    """
    result: Tensor = _Fp8SwiGluLinear.apply(weight, layer, tiles, torch.is_grad_enabled(), *gate_up)
    return result


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, layer: DeferrableLayer, tiles: RowTiles | None, operand: Operand
    ) -> Tensor:
        fp8 = _fp8(layer)
        ctx.weight, ctx.layer, ctx.tiles = weight, layer, tiles
        if operand.columns is not None:
            _save(ctx, [operand.columns])
        y = fp8.backend.product(operand.rows, fp8.weight(weight).forward, tiles, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (columns,) = _saved(ctx)
        grad_x, grad_weight = _gradients(ctx, grads[0], columns, wants_input=ctx.needs_input_grad[0])
        return grad_x, grad_weight, None, None, None


class _Fp8SwiGluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        layer: DeferrableLayer,
        tiles: RowTiles | None,
        records: bool,
        *gate_up: Tensor,
    ) -> Tensor:
        fp8 = _fp8(layer)
        ctx.weight, ctx.layer, ctx.tiles = weight, layer, tiles
        gate, up = _halves(gate_up)
        ctx.dtype = gate.dtype
        if records:
            # Side by side, halves are rows of their own: no tile spans both.
            _save(ctx, [fp8.quantize_rows(part.reshape(-1, gate.shape[-1])) for part in gate_up])
        rows = fp8.quantize_input(swiglu_forward(gate, up), tiles).rows  # no columns: nothing is recorded in here
        y = fp8.backend.product(rows, fp8.weight(weight).forward, tiles, gate.dtype)
        return y.view(*gate.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y = grads[0]
        width = ctx.weight.shape[-1]
        count = len(ctx.metas)
        shape = (*grad_y.shape[:-1], width if count == 2 else 2 * width)
        gate_up = [cached.dequantize().to(ctx.dtype).reshape(shape) for cached in _saved(ctx)]
        gate, up = _halves(gate_up)
        hidden = swiglu_forward(gate, up).reshape(-1, width)
        columns = _fp8(ctx.layer).quantize_columns(hidden, ctx.tiles)
        grad_hidden, grad_weight = _gradients(ctx, grad_y, columns, wants_input=True)
        assert grad_hidden is not None
        into = [torch.empty_like(part) for part in gate_up]
        swiglu_gradients(grad_hidden, gate, up, *_halves(into))
        return grad_weight, None, None, None, *into


def _gradients(
    ctx: Any, grad_y: Tensor, columns: Quantized, *, wants_input: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input (in the precision of ``grad_y``) and of the weight."""
    layer, weight, tiles = ctx.layer, ctx.weight, ctx.tiles
    fp8 = _fp8(layer)
    grad = fp8.quantize_grad(grad_y, tiles)
    grad_x = None
    if wants_input:
        grad_x = fp8.backend.product(grad.rows, fp8.weight(weight).backward, tiles, grad_y.dtype)
        grad_x = grad_x.view(*grad_y.shape[:-1], grad_x.shape[-1])
    grad_columns = grad.columns  # alone: a withheld gradient must not hold the rows, too
    assert grad_columns is not None
    return grad_x, layer.deliver(weight, lambda: fp8.backend.weight_grad(grad_columns, columns, tiles))


def _fp8(layer: DeferrableLayer) -> Fp8Layer:
    assert layer.fp8 is not None
    return layer.fp8


def _halves(gate_up: Any) -> tuple[Tensor, Tensor]:
    """gate and up, each a view if they lie side by side."""
    gate, up = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, dim=-1)
    return gate, up


def _save(ctx: Any, matrices: list[Quantized]) -> None:
    """Keep tensors where activation checkpointing and offloading see them."""
    ctx.metas = [(matrix.tile, matrix.shape) for matrix in matrices]
    ctx.save_for_backward(*(tensor for matrix in matrices for tensor in (matrix.values, matrix.scales)))


def _saved(ctx: Any) -> list[Quantized]:
    tensors = iter(ctx.saved_tensors)
    return [Quantized(next(tensors), next(tensors), *meta) for meta in ctx.metas]
