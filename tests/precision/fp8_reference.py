"""The FP8 recipe once more, as slowly as it reads: numpy, one tile at a time, products in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]

_POSITIVE = sorted(
    {m / 8 * 2.0**-6 for m in range(8)} | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)} - {480.0}
)
"""Every number of E4M3 from 0 to 448: 3 bits of mantissa, exponents -6 to 8, subnormals below 2^-6; 480's pattern is NaN."""


def round_to_e4m3(x: float) -> float:
    """The nearest number of E4M3; of two equally near ones that with an even mantissa."""
    magnitude = abs(x)
    above = int(np.searchsorted(_POSITIVE, magnitude))
    candidates = _POSITIVE[max(above - 1, 0) : above + 1]
    # Position in the list counts mantissas and exponents together, so its parity is that of the mantissa.
    best = min(candidates, key=lambda c: (abs(c - magnitude), _POSITIVE.index(c) % 2))
    return float(np.copysign(best, x))


def quantize_tile(tile: Array, *, power_of_two: bool) -> tuple[Array, float]:
    """Values and scale of one tile; arithmetic that the recipe does in fp32 is done in fp32."""
    amax = max(np.float32(np.abs(tile).max()), np.float32(2.0**-110))
    scale, inverse = amax / np.float32(448), np.float32(448) / amax
    if power_of_two:
        scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
        inverse = np.float32(1) / scale
    scaled = tile.astype(np.float32) * inverse
    return np.vectorize(round_to_e4m3)(scaled.astype(np.float64)), float(scale)


def quantize(x: Array, tile: tuple[int, int], *, power_of_two: bool) -> tuple[Array, Array, Array]:
    """Values [R, C], scales [tiles, tiles], and their product [R, C], exact in float64."""
    height, width = tile
    counts = -(-x.shape[0] // height), -(-x.shape[1] // width)
    values, scales, products = np.zeros_like(x), np.zeros(counts), np.zeros_like(x)
    for i in range(counts[0]):
        for j in range(counts[1]):
            place = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            values[place], scales[i, j] = quantize_tile(x[place], power_of_two=power_of_two)
            products[place] = values[place] * scales[i, j]
    return values, scales, products


def rounded(x: Tensor, tile: tuple[int, int], *, power_of_two: bool = False) -> Tensor:
    """What is left of a matrix after quantisation, float64."""
    return torch.from_numpy(quantize(x.double().numpy(), tile, power_of_two=power_of_two)[2])


def linear(x: Tensor, weight: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient and weight gradient of one linear layer as the recipe has them, products in float64.

    Args:
        x: [N, in].
        weight: [out, in].
        grad_y: [N, out].
    """
    blocks = rounded(weight, (128, 128))
    return (
        rounded(x, (1, 128)) @ blocks.t(),
        rounded(grad_y, (1, 128)) @ blocks,
        rounded(grad_y, (128, 1)).t() @ rounded(x, (128, 1)),
    )
