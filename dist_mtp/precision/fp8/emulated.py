"""The recipe in plain torch, on any device: values are really rounded to E4M3, products are those of the rounded numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_mtp.precision.fp8.tiles import BLOCKS, COLUMN_TILES, ROW_TILES, Quantized, RowTiles, quantize
from dist_mtp.precision.grouped import rows_times_weights, weight_grad


class EmulatedBackend:
    """Products in fp32 of values times scales. Kernels scale each sum of 128 values; here each value is scaled, and rounded
    to fp32, before it is multiplied. Both are within fp32 rounding of the exact product of the quantised matrices."""

    name = "emulated"

    def quantize_rows(self, x: Tensor, *, power_of_two: bool) -> Quantized:
        return quantize(x, ROW_TILES, power_of_two=power_of_two)

    def quantize_columns(self, x: Tensor, tiles: RowTiles | None, *, power_of_two: bool) -> Quantized:
        return quantize(x if tiles is None else tiles.pad(x), COLUMN_TILES, power_of_two=power_of_two)

    def quantize_both(self, x: Tensor, tiles: RowTiles | None, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
        x = x.float()
        return (
            self.quantize_rows(x, power_of_two=power_of_two),
            self.quantize_columns(x, tiles, power_of_two=power_of_two),
        )

    def quantize_weight(self, weight: Tensor, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
        blocks = quantize(weight, BLOCKS, power_of_two=power_of_two)
        return blocks, blocks.transposed

    def product(self, rows: Quantized, weight: Quantized, tiles: RowTiles | None, dtype: torch.dtype) -> Tensor:
        x, w = rows.dequantize(), weight.dequantize().mT
        return (x @ w if tiles is None else rows_times_weights(x, w, tiles.ends_E)).to(dtype)

    def weight_grad(self, grad: Quantized, x: Quantized, tiles: RowTiles | None) -> Tensor:
        if tiles is None:
            return grad.dequantize().t() @ x.dequantize()
        return weight_grad(grad.dequantize(), x.dequantize(), tiles.padded_ends_E)
