"""Quantised rows as plain bytes, for the wire: values, then one exponent for each 128 of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_mtp.precision.fp8.tiles import E4M3, ROW_TILES, Quantized


def pack(rows: Quantized) -> Tensor:
    """uint8 [N, C' + C' / 128]. Scales are powers of two, so their exponents, 8 bits, say everything.

    A scale that is not finite arrives as infinity.
    """
    exponents = rows.scales[: rows.shape[0]].view(torch.int32) >> 23
    return torch.cat((rows.values[: rows.shape[0]].view(torch.uint8), exponents.to(torch.uint8)), dim=1)


def unpack(packed: Tensor, width: int) -> Quantized:
    """The reverse. Args: width: C, of the rows."""
    padded = width + -width % ROW_TILES[1]
    values, exponents = packed.split((padded, padded // ROW_TILES[1]), dim=1)
    scales = (exponents.to(torch.int32) << 23).view(torch.float32)
    return Quantized(values.contiguous().view(E4M3), scales, ROW_TILES, (len(packed), width))
