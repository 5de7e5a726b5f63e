"""Triton kernels that multiply matrices in E4M3 with scales by tile, dense or of experts.

Tensor cores sum 128 products, then the sum times its scales is added in fp32 (arXiv 2412.19437, section 3.3.2: their own
accumulator keeps about 14 bits). Operands are those of ``triton_quantize.py``: the summed dimension is contiguous and padded
to whole tiles with zeros.
"""

# mypy: allow-untyped-defs
# Kernels' arguments are pointers and integers that only Triton can name.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_mtp.precision.fp8.tiles import TILE, Quantized, RowTiles

SIDE = tl.constexpr(TILE)
STAGES = 4
"""Steps of 128 that are loaded ahead, 32 KiB each: 128 KiB of shared memory on compute capability 9 and 10, which have 227, and
96 KiB elsewhere, of 99."""
GROUP = tl.constexpr(8)
"""Programs that run together share this many tiles of rows and walk over the columns: both stay in the L2 cache."""


def product(rows: Quantized, weight: Quantized, tiles: RowTiles | None, dtype: torch.dtype) -> Tensor:
    """[N, C] in row tiles times [.., M, C] in blocks, transposed -> [N, M]; see ``Fp8Backend.product``."""
    num_rows, num_columns = rows.shape[0], weight.shape[-2]
    out = rows.values.new_empty((num_rows, num_columns), dtype=dtype)
    tile_rows = tile_rows_for(num_rows) if tiles is None else TILE
    num_tiles = triton.cdiv(num_rows, tile_rows) if tiles is None else len(tiles.first_T)
    _product[(num_tiles * triton.cdiv(num_columns, TILE),)](
        rows.values,
        rows.scales,
        rows.scales.stride(-1),
        weight.values,
        weight.scales,
        out,
        num_tiles,
        num_rows,
        num_columns,
        rows.values.shape[1] // TILE,
        *((None, None, None) if tiles is None else (tiles.expert_T, tiles.first_T, tiles.rows_T)),
        GROUPED=tiles is not None,
        TILE_ROWS=tile_rows,
        num_warps=tile_rows // 16,
        num_stages=STAGES,
    )
    return out


def weight_grad(grad: Quantized, x: Quantized, tiles: RowTiles | None) -> Tensor:
    """[N, out]^T times [N, in], both in column tiles -> fp32 [.., out, in]; see ``Fp8Backend.weight_grad``."""
    num_rows, num_columns = grad.shape[1], x.shape[1]
    stack = () if tiles is None else tiles.padded_ends_E.shape
    out = grad.values.new_empty((*stack, num_rows, num_columns), dtype=torch.float32)
    blocks = triton.cdiv(num_rows, TILE) * triton.cdiv(num_columns, TILE)
    _weight_grad[(blocks, *(stack or (1,)))](
        grad.values,
        grad.scales,
        grad.values.shape[1],
        x.values,
        x.scales,
        x.values.shape[1],
        out,
        num_rows,
        num_columns,
        grad.values.shape[0] // TILE,
        None if tiles is None else tiles.padded_ends_E,
        GROUPED=tiles is not None,
        num_warps=8,
        num_stages=STAGES,
    )
    return out


def tile_rows_for(num_rows: int) -> int:
    """Rows that one program computes: fewer where a whole tile would be mostly empty."""
    return TILE // 2 if num_rows <= TILE // 2 else TILE


@triton.jit
def _product(
    a,
    a_scales,
    a_scale_stride,
    b,
    b_scales,
    out,
    num_tiles,
    num_rows,
    num_columns,
    num_sums,
    expert_T,
    first_T,
    rows_T,
    GROUPED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """A program computes the rows of one tile, for 128 columns. a: [N, K], b: [.., M, K], K = 128 ``num_sums``."""
    num_blocks = tl.cdiv(num_columns, SIDE)
    program = tl.program_id(0)
    tile, block = tl.swizzle2d(program // num_blocks, program % num_blocks, num_tiles, num_blocks, GROUP)
    if GROUPED:
        first, count = tl.load(first_T + tile), tl.load(rows_T + tile)
        expert = tl.load(expert_T + tile).to(tl.int64)
    else:
        first, count = tile * TILE_ROWS, tl.minimum(num_rows - tile * TILE_ROWS, TILE_ROWS)
        expert = tl.zeros((), tl.int64)
    if count > 0:
        row_offsets = tl.arange(0, TILE_ROWS)
        # Reading a row too many is harmless and keeps masks, which cost registers, out of the loop.
        rows = tl.minimum(first + row_offsets, num_rows - 1)
        inner = tl.arange(0, SIDE)
        columns = block * SIDE + inner
        depth = num_sums * SIDE
        a_block = a + rows[:, None].to(tl.int64) * depth + inner[None, :]
        b_block = b + (expert * num_blocks * SIDE + columns)[None, :] * depth + inner[:, None]
        a_scale, b_scale = a_scales + rows, b_scales + (expert * num_blocks + block) * num_sums
        total = tl.zeros((TILE_ROWS, SIDE), tl.float32)
        for _ in range(num_sums):
            scale = tl.load(a_scale) * tl.load(b_scale)
            total += tl.dot(tl.load(a_block), tl.load(b_block)) * scale[:, None]
            a_block += SIDE
            b_block += SIDE
            a_scale += a_scale_stride
            b_scale += 1
        target = out + (first + row_offsets)[:, None].to(tl.int64) * num_columns + columns[None, :]
        kept = (row_offsets < count)[:, None] & (columns < num_columns)[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _weight_grad(
    a,
    a_scales,
    a_width,
    b,
    b_scales,
    b_width,
    out,
    num_rows,
    num_columns,
    num_sums,
    padded_ends_E,
    GROUPED: tl.constexpr,
):
    """A program computes 128 x 128 of one expert's gradient. a: [a_width, N], b: [b_width, N], N = 128 ``num_sums``."""
    row_blocks, column_blocks = tl.cdiv(num_rows, SIDE), tl.cdiv(num_columns, SIDE)
    program = tl.program_id(0)
    row_block, column_block = tl.swizzle2d(
        program // column_blocks, program % column_blocks, row_blocks, column_blocks, GROUP
    )
    expert = tl.program_id(1)
    if GROUPED:
        start = tl.load(padded_ends_E + expert - 1, mask=expert > 0, other=0) // SIDE
        end = tl.load(padded_ends_E + expert) // SIDE
    else:
        start, end = 0, num_sums
    inner = tl.arange(0, SIDE)
    rows, columns = row_block * SIDE + inner, column_block * SIDE + inner
    a_rows, b_rows = tl.minimum(rows, a_width - 1), tl.minimum(columns, b_width - 1)
    depth = num_sums * SIDE
    a_block = a + a_rows[:, None].to(tl.int64) * depth + inner[None, :]
    b_block = b + b_rows[None, :].to(tl.int64) * depth + inner[:, None]
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for tile in range(start, end):
        a_scale = tl.load(a_scales + tile * a_width + rows, mask=rows < a_width, other=0.0)
        b_scale = tl.load(b_scales + tile * b_width + columns, mask=columns < b_width, other=0.0)
        partial = tl.dot(tl.load(a_block + tile * SIDE), tl.load(b_block + tile * SIDE))
        total += partial * a_scale[:, None] * b_scale[None, :]
    target = out + (expert.to(tl.int64) * num_rows + rows)[:, None] * num_columns + columns[None, :]
    tl.store(target, total, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :])
