"""The recipe's numbers: matrices in E4M3 with one fp32 scale per tile, made online from the tile's own largest value.

Activations and gradients have tiles of 128 values along the dimension that a product sums over, weights have blocks of
128 x 128 (arXiv 2412.19437, section 3.3.2). This file is the definition; kernels are compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
MIN_AMAX = 2.0**-110
"""Tiles whose largest magnitude is below count as if it were this: then neither the scale nor its inverse leaves fp32's
normal range."""

ROW_TILES, COLUMN_TILES, BLOCKS = (1, TILE), (TILE, 1), (TILE, TILE)


@dataclass(frozen=True)
class Quantized:
    """A matrix [R, C], or a stack of E of them, as ``values * scales``, tile by tile.

    ``values``: E4M3 [.., R', C'] with R' >= R and C' >= C whole tiles, zero outside of the matrix. ``scales``: fp32
    [.., R' / tile rows, C' / tile columns]. Strides of both are the backend's choice. ``tile``: rows and columns of a tile.
    ``shape``: that of the matrix.
    """

    values: Tensor
    scales: Tensor
    tile: tuple[int, int]
    shape: tuple[int, ...]

    @property
    def transposed(self) -> Quantized:
        """The transpose; no data moves."""
        return Quantized(
            self.values.mT, self.scales.mT, self.tile[::-1], (*self.shape[:-2], self.shape[-1], self.shape[-2])
        )

    def with_tensors(self, values: Tensor, scales: Tensor) -> Quantized:
        return replace(self, values=values, scales=scales)

    def dequantize(self) -> Tensor:
        """fp32 [.., R, C], each value times its scale, rounded once."""
        rows, columns = self.shape[-2:]
        tiles = _as_tiles(_to_fp32(self.values), self.tile).mul_(self.scales[..., :, None, :, None])
        return tiles.flatten(-2).flatten(-3, -2)[..., :rows, :columns]


def quantize(x: Tensor, tile: tuple[int, int], *, power_of_two: bool) -> Quantized:
    """Round a matrix to E4M3 with one scale per tile.

    With ``a`` the largest magnitude of a tile, ``scale = a / 448`` and ``value = round(x * (448 / a))``, to the nearest,
    ties to even. With ``power_of_two`` the scale is the next power of two not below ``a / 448``, so that ``value * scale``
    is exact and quantising again along the same tiles changes nothing. Nothing is clipped; a tile with a NaN or an infinity
    has a scale that is not finite either.

    Args:
        x: [.., R, C] in any floating type.
        tile: rows and columns of a tile.
    """
    rows, columns = x.shape[-2:]
    tiles = _as_tiles(F.pad(x.float(), (0, -columns % tile[1], 0, -rows % tile[0])), tile)
    scales, inverses = scales_of(tiles.abs().amax(dim=(-3, -1)), power_of_two=power_of_two)
    values = (tiles * inverses[..., :, None, :, None]).to(E4M3)
    return Quantized(values.flatten(-2).flatten(-3, -2), scales, tile, tuple(x.shape))


def scales_of(amax: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Scales of tiles and what their values are multiplied by, both fp32, from the tiles' largest magnitudes (fp32)."""
    amax = amax.clamp_min(MIN_AMAX)
    # A tensor, because torch divides by a number on GPUs, and a number by a tensor everywhere, in two roundings.
    largest = torch.full_like(amax, E4M3_MAX)
    exact = amax / largest
    if not power_of_two:
        return exact, largest / amax
    # An fp32 number above 0 is 2^exponent * (1 + mantissa): any mantissa rounds the exponent up.
    exponent = (exact.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    scales = torch.where(exact.isfinite(), exponent.view(torch.float32), exact)
    return scales, scales.reciprocal()


def _as_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """[.., R', C'] -> [.., R' / r, r, C' / c, c]."""
    rows, columns = x.shape[-2:]
    return x.unflatten(-1, (columns // tile[1], tile[1])).unflatten(-3, (rows // tile[0], tile[0]))


def _to_fp32(values: Tensor) -> Tensor:
    """E4M3 to fp32 of its own, exactly. NaN comes out as 480; its tile's scale is not finite.

    On CPUs torch converts one number after the other, 3.3 ns each; the bits of an E4M3 number, moved to fp16's places, are the
    same number times 2^-8, subnormal ones included, and fp16 is converted four times faster.
    """
    if not values.is_cpu:
        return values.float()
    bits = (values.view(torch.int8).to(torch.int16) << 7) & ~0x4000
    return bits.view(torch.float16).float().mul_(256)


@dataclass(frozen=True)
class RowTiles:
    """Rows sorted by expert, cut into tiles of at most 128 rows of one expert.

    With 130 rows of expert 0, none of expert 1 and 5 of expert 2: experts ``[0, 0, 2]``, first rows ``[0, 128, 130]``, rows
    ``[128, 2, 5]``, and ends ``[256, 256, 384]`` once every tile is padded to 128 rows.

    ``expert_T``, ``first_T``, ``rows_T``: int32 [tiles]; tiles behind the last expert's have no rows. ``padded_ends_E``: int32
    [E]. ``ends_E``: int32 [E], of the rows themselves. ``num_rows``: N, rows in all.
    """

    expert_T: Tensor
    first_T: Tensor
    rows_T: Tensor
    padded_ends_E: Tensor
    ends_E: Tensor
    num_rows: int

    @staticmethod
    def of(ends_E: Tensor, num_rows: int) -> RowTiles:
        """Args: ends_E: int32, end row of each expert. On GPUs there are as many tiles as there could be: nothing waits."""
        starts_E = F.pad(ends_E[:-1], (1, 0))
        tile_ends_E = ((ends_E - starts_E + TILE - 1) // TILE).cumsum(0)
        num_tiles = int(tile_ends_E[-1]) if ends_E.is_cpu else num_rows // TILE + len(ends_E)
        tiles = torch.arange(num_tiles, device=ends_E.device)
        expert_T = torch.searchsorted(tile_ends_E, tiles, right=True).clamp_max(len(ends_E) - 1)
        first_T = starts_E[expert_T] + TILE * (tiles - F.pad(tile_ends_E[:-1], (1, 0))[expert_T])
        rows_T = (ends_E[expert_T] - first_T).clamp(0, TILE)
        expert, first, rows, padded = (t.to(torch.int32) for t in (expert_T, first_T, rows_T, TILE * tile_ends_E))
        return RowTiles(expert, first, rows, padded, ends_E, num_rows)

    def pad(self, x_NC: Tensor) -> Tensor:
        """Rows to the places that whole tiles give them, zeros between: [N, C] -> [tiles * 128, C]."""
        inside = torch.arange(TILE, device=x_NC.device)
        source_TR = self.first_T[:, None] + inside
        filled = (inside < self.rows_T[:, None]).flatten()
        padded = x_NC.new_zeros(filled.numel(), x_NC.shape[1])
        if x_NC.shape[0] == 0:
            return padded
        rows = x_NC[source_TR.flatten().clamp_max(x_NC.shape[0] - 1)]
        return torch.where(filled[:, None], rows, padded)
