"""Triton kernels that cast, scale and transpose in one pass.

Numbers are those of ``tiles.py``, bit by bit. Values lie as tensor cores want them: the dimension that a product
sums over is contiguous, so matrices in column tiles are stored transposed and returned as a transposed view.
"""

# mypy: allow-untyped-defs
# Kernels' arguments are pointers and integers that only Triton can name.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_mtp.precision.fp8.tiles import (
    BLOCKS,
    COLUMN_TILES,
    E4M3,
    E4M3_MAX,
    MIN_AMAX,
    ROW_TILES,
    TILE,
    Quantized,
    RowTiles,
)

ALIGNMENT = 16
"""Rows of a matrix in row tiles, and columns of one in column tiles, are a multiple of this: cuBLASLt asks for it."""

SIDE = tl.constexpr(TILE)
LARGEST = tl.constexpr(E4M3_MAX)
MIN_AMAX_BITS = tl.constexpr(int(torch.tensor(MIN_AMAX).view(torch.int32)))


def quantize_rows(x: Tensor, *, power_of_two: bool) -> Quantized:
    """[N, C] -> values [N', C'] with C contiguous, scales [N', C' / 128] with N' contiguous; N' a multiple of 16."""
    rows, _ = _quantize(x, None, power_of_two, with_rows=True, with_columns=False)
    assert rows is not None
    return rows


def quantize_columns(x: Tensor, tiles: RowTiles | None, *, power_of_two: bool) -> Quantized:
    """[N, C] -> values [N', C'] with N' contiguous, scales [N' / 128, C'] with C' contiguous; C' a multiple of 16."""
    _, columns = _quantize(x, tiles, power_of_two, with_rows=False, with_columns=True)
    assert columns is not None
    return columns


def quantize_both(x: Tensor, tiles: RowTiles | None, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
    """:func:`quantize_rows` and :func:`quantize_columns`. With ``tiles`` the former's rows are not padded: N' = N."""
    rows, columns = _quantize(x, tiles, power_of_two, with_rows=True, with_columns=True)
    assert rows is not None
    assert columns is not None
    return rows, columns


def quantize_weight(weight: Tensor, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
    """[.., out, in] in blocks, with ``in`` contiguous, and its transpose, with ``out`` contiguous."""
    *stack, num_rows, num_columns = weight.shape
    stacked = weight.reshape(-1, num_rows, num_columns)
    blocks = (triton.cdiv(num_rows, TILE), triton.cdiv(num_columns, TILE))
    pair = []
    for block_rows, block_columns, shape in (
        (*blocks, (num_rows, num_columns)),
        (*blocks[::-1], (num_columns, num_rows)),
    ):
        values = weight.new_empty((*stack, TILE * block_rows, TILE * block_columns), dtype=E4M3)
        scales = weight.new_empty((*stack, block_rows, block_columns), dtype=torch.float32)
        pair.append(Quantized(values, scales, BLOCKS, (*stack, *shape)))
    forward, backward = pair
    _quantize_blocks[(*blocks, len(stacked))](
        stacked,
        *stacked.stride(),
        num_rows,
        num_columns,
        forward.values,
        forward.scales,
        backward.values,
        backward.scales,
        POWER_OF_TWO=power_of_two,
        num_warps=8,
    )
    return forward, backward


def _quantize(
    x: Tensor, tiles: RowTiles | None, power_of_two: bool, *, with_rows: bool, with_columns: bool
) -> tuple[Quantized | None, Quantized | None]:
    num_rows, num_columns = x.shape
    num_tiles = triton.cdiv(num_rows, TILE) if tiles is None else len(tiles.first_T)
    num_blocks = triton.cdiv(num_columns, TILE)
    # Rows after the last expert's belong to no tile, so nobody would write padding there; grouped products need none.
    row_count = _aligned(num_rows) if tiles is None else num_rows
    rows = columns = None
    if with_rows:
        values = x.new_empty((row_count, TILE * num_blocks), dtype=E4M3)
        scales = x.new_empty((num_blocks, row_count), dtype=torch.float32)
        rows = Quantized(values, scales.t(), ROW_TILES, (num_rows, num_columns))
    if with_columns:
        values = x.new_empty((_aligned(num_columns), TILE * num_tiles), dtype=E4M3)
        scales = x.new_empty((num_tiles, _aligned(num_columns)), dtype=torch.float32)
        padded_rows = num_rows if tiles is None else TILE * num_tiles
        columns = Quantized(values.t(), scales, COLUMN_TILES, (padded_rows, num_columns))
    _quantize_tiles[(num_tiles, num_blocks)](
        x,
        *x.stride(),
        num_rows,
        num_columns,
        None if tiles is None else tiles.first_T,
        None if tiles is None else tiles.rows_T,
        None if rows is None else rows.values,
        None if rows is None else rows.scales,
        row_count,
        None if columns is None else columns.values,
        None if columns is None else columns.scales,
        _aligned(num_columns),
        GROUPED=tiles is not None,
        ROWS=with_rows,
        COLUMNS=with_columns,
        POWER_OF_TWO=power_of_two,
        num_warps=8,
    )
    return rows, columns


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@triton.jit
def _scales_of(amax_bits, POWER_OF_TWO: tl.constexpr):
    """``tiles.scales_of``, from the bits of the largest magnitudes."""
    amax = tl.maximum(amax_bits, MIN_AMAX_BITS).to(tl.float32, bitcast=True)
    # Not `/`: on GPUs that is a fast division, off by a unit in the last place.
    scales = tl.div_rn(amax, LARGEST)
    if POWER_OF_TWO:
        exponents = (scales.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scales = tl.where(scales < float("inf"), exponents.to(tl.float32, bitcast=True), scales)
        inverses = tl.div_rn(1.0, scales)
    else:
        inverses = tl.div_rn(LARGEST, amax)
    return scales, inverses


@triton.jit
def _magnitude_bits(x):
    """Bits of |x|. As integers they are in the order of the numbers, with NaN, which ``tl.max`` of numbers drops, on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _quantize_tiles(
    x,
    x_row_stride,
    x_column_stride,
    num_rows,
    num_columns,
    first_T,
    rows_T,
    row_values,
    row_scales,
    row_count,
    column_values,
    column_scales,
    column_count,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """A program quantises 128 x 128 numbers: along rows, along columns, or both. Grid: tiles of rows, blocks of columns."""
    tile, block = tl.program_id(0), tl.program_id(1)
    inside = tl.arange(0, SIDE)
    columns = block * SIDE + inside
    if GROUPED:
        rows = tl.load(first_T + tile) + inside
        filled = inside < tl.load(rows_T + tile)
        row_kept = filled
    else:
        rows = tile * SIDE + inside
        filled = rows < num_rows
        row_kept = rows < row_count
    source = x + rows[:, None].to(tl.int64) * x_row_stride + columns[None, :].to(tl.int64) * x_column_stride
    exact = tl.load(source, mask=filled[:, None] & (columns < num_columns)[None, :], other=0.0).to(tl.float32)
    magnitudes = _magnitude_bits(exact)
    if ROWS:
        scales, inverses = _scales_of(tl.max(magnitudes, axis=1), POWER_OF_TWO)
        values = (exact * inverses[:, None]).to(tl.float8e4nv)
        width = tl.num_programs(1) * SIDE
        target = row_values + rows[:, None].to(tl.int64) * width + columns[None, :]
        tl.store(target, values, mask=row_kept[:, None])
        tl.store(row_scales + block.to(tl.int64) * row_count + rows, scales, mask=row_kept)
    if COLUMNS:
        scales, inverses = _scales_of(tl.max(magnitudes, axis=0), POWER_OF_TWO)
        values = (exact * inverses[None, :]).to(tl.float8e4nv)
        depth = tl.num_programs(0) * SIDE
        column_kept = columns < column_count
        target = column_values + columns[None, :].to(tl.int64) * depth + (tile * SIDE + inside)[:, None]
        tl.store(target, values, mask=column_kept[None, :])
        tl.store(column_scales + tile.to(tl.int64) * column_count + columns, scales, mask=column_kept)


@triton.jit
def _quantize_blocks(
    weight,
    expert_stride,
    row_stride,
    column_stride,
    num_rows,
    num_columns,
    values,
    scales,
    transposed_values,
    transposed_scales,
    POWER_OF_TWO: tl.constexpr,
):
    """A program quantises one 128 x 128 block and stores it twice. Grid: blocks of rows, blocks of columns, experts."""
    block_row, block_column, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    block_rows, block_columns = tl.num_programs(0), tl.num_programs(1)
    inside = tl.arange(0, SIDE)
    rows, columns = block_row * SIDE + inside, block_column * SIDE + inside
    source = weight + expert * expert_stride + rows[:, None].to(tl.int64) * row_stride
    source += columns[None, :].to(tl.int64) * column_stride
    exact = tl.load(source, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :], other=0.0)
    exact = exact.to(tl.float32)
    scale, inverse = _scales_of(tl.max(tl.max(_magnitude_bits(exact), axis=1), axis=0), POWER_OF_TWO)
    block_values = (exact * inverse).to(tl.float8e4nv)
    row_ids = expert * block_rows * SIDE + rows
    tl.store(values + row_ids[:, None] * (block_columns * SIDE) + columns[None, :], block_values)
    tl.store(scales + (expert * block_rows + block_row) * block_columns + block_column, scale)
    column_ids = expert * block_columns * SIDE + columns
    tl.store(transposed_values + column_ids[None, :] * (block_rows * SIDE) + rows[:, None], block_values)
    tl.store(transposed_scales + (expert * block_columns + block_column) * block_rows + block_row, scale)
