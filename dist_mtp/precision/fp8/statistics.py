"""How well tensors fit into E4M3, by kind of layer and role: what underflows or saturates, the error, the range of scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_mtp.precision.fp8.tiles import E4M3_MAX, MIN_AMAX, TILE, Quantized
from dist_mtp.precision.recomputation import is_recomputing

KINDS = ("attention", "feed_forward", "shared_experts", "experts", "mtp_projection")
ROLES = ("input", "weight", "grad")

_SUMS = 5
"""Not zero; of those, zero after rounding; beyond the largest value or in a tile with something not finite; squared error; squared value."""
_PIECE = 2**22
"""Values that are looked at together."""
_SATURATED = 464.0
"""Halfway between E4M3's largest value, 448, and the one that its pattern would continue with."""


@dataclass(frozen=True)
class Fit:
    """How one kind and role fit. Shares are those of the values that are not zero.

    ``saturation``: beyond the largest value, which nothing is with scales made online, or in a tile with something not finite. ``error``: root of the squared error over the squared values. ``scale_min``, ``scale_max``: of tiles that are not all 0.
    """

    underflow: float
    saturation: float
    error: float
    scale_min: float
    scale_max: float


class Fp8Statistics:
    """Sums over everything that is quantised while ``active``; nothing waits for the device before :meth:`take`, which ends it."""

    def __init__(self) -> None:
        self.active = False
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._ranges: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def observe(self, kind: str, role: str, x: Tensor, quantized: Quantized) -> None:
        """x: what was quantised, of ``quantized.shape``. Recomputation is not counted again."""
        if not self.active or is_recomputing() or x.numel() == 0:
            return
        # In pieces, because what is made of a value here takes ten times its own memory.
        sums = torch.stack([_count(exact, piece) for exact, piece in _pieces(x, quantized)]).sum(0)
        used = quantized.scales > MIN_AMAX / E4M3_MAX * 2
        extremes = torch.stack([
            torch.where(used, -quantized.scales, -torch.inf).amax(),
            torch.where(used, quantized.scales, -torch.inf).amax(),
        ])  # fmt: skip
        key = kind, role
        self._sums[key] = sums + self._sums[key] if key in self._sums else sums
        self._ranges[key] = torch.maximum(extremes, self._ranges[key]) if key in self._ranges else extremes

    def take(self) -> tuple[list[float], list[float]]:
        """Everything since the last call as two lists of the same layout on all ranks: to be summed, and to be maximised."""
        sums: list[float] = []
        ranges: list[float] = []
        for key in _keys():
            sums += self._sums[key].tolist() if key in self._sums else [0.0] * _SUMS
            ranges += self._ranges[key].tolist() if key in self._ranges else [-torch.inf] * 2
        self.active = False
        self._sums.clear()
        self._ranges.clear()
        return sums, ranges


def fits(sums: list[float], ranges: list[float]) -> dict[tuple[str, str], Fit]:
    """From what :meth:`Fp8Statistics.take` gave on all ranks, reduced; kinds of which nothing was seen are left out."""
    result = {}
    for index, key in enumerate(_keys()):
        count, underflow, saturated, error, square = sums[_SUMS * index : _SUMS * (index + 1)]
        if count:
            low, high = ranges[2 * index : 2 * index + 2]
            # Values so small that their squares vanish even in fp64 have no error to speak of.
            relative = (error / square) ** 0.5 if square else 0.0
            result[key] = Fit(underflow / count, saturated / count, relative, -low, high)
    return result


def _keys() -> list[tuple[str, str]]:
    return [(kind, role) for kind in KINDS for role in ROLES]


def _pieces(x: Tensor, quantized: Quantized) -> Iterator[tuple[Tensor, Quantized]]:
    """Runs of whole rows of tiles, of about :data:`_PIECE` values, with what was quantised."""
    height, width = quantized.tile
    rows, columns = quantized.shape[-2:]
    step = max(1, _PIECE // columns // TILE) * TILE
    stacks = [t.reshape(-1, *t.shape[-2:]) for t in (x, quantized.values, quantized.scales)]
    for exact, values, scales in zip(*stacks, strict=True):
        for start in range(0, rows, step):
            end = min(start + step, rows)
            tiles = slice(start // height, -(-end // height))
            piece = values[tiles.start * height : tiles.stop * height], scales[tiles]
            yield exact[start:end], Quantized(*piece, (height, width), (end - start, columns))


def _count(x: Tensor, quantized: Quantized) -> Tensor:
    """The sums of one matrix, fp64 [_SUMS]."""
    exact, found = x.float(), quantized.dequantize()
    scales = quantized.scales
    for dim, size in zip((-2, -1), quantized.tile, strict=True):
        scales = scales.repeat_interleave(size, dim)
    nonzero = exact != 0
    scales = scales[: x.shape[0], : x.shape[1]]
    saturated = (exact.abs() > _SATURATED * scales) | ~scales.isfinite()
    return torch.stack([
        nonzero.sum().double(),
        (nonzero & (found == 0)).sum().double(),
        saturated.sum().double(),
        (found - exact).double().square().sum(),
        exact.double().square().sum(),
    ])  # fmt: skip
