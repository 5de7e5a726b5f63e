"""Statistics of FP8: what a person counts by hand, added over calls and ranks."""

from __future__ import annotations

import math

import pytest
import torch

from dist_mtp.precision.fp8.statistics import Fp8Statistics, fits
from dist_mtp.precision.fp8.tiles import BLOCKS, ROW_TILES, quantize


def row(*values: float) -> torch.Tensor:
    return torch.tensor([list(values)])


def observe(statistics: Fp8Statistics, x: torch.Tensor) -> None:
    statistics.observe("experts", "grad", x, quantize(x, ROW_TILES, power_of_two=True))


def test_counts() -> None:
    """448 has scale 1: 0.0009 is less than half of the smallest number, 2^-9, and 0 is no loss; 9.3 becomes 9."""
    statistics = Fp8Statistics()
    statistics.active = True
    observe(statistics, row(448.0, 0.0009, 0.0, 9.3))
    observe(statistics, row(448.0 / 1024))
    observe(statistics, row(0.0, 0.0))  # a tile without a scale worth naming
    (fit,) = fits(*statistics.take()).values()
    expected = math.sqrt((0.3**2 + 0.0009**2) / (448**2 * (1 + 2**-20) + 9.3**2 + 0.0009**2))
    assert fit.underflow == 1 / 4, f"{fit}"
    assert fit.saturation == 0, f"{fit}"
    assert fit.error == pytest.approx(expected, rel=1e-5), f"{fit} != {expected}"
    assert (fit.scale_min, fit.scale_max) == (2.0**-10, 1.0), f"{fit}"


def test_saturation_is_what_a_scale_leaves_out() -> None:
    """Scales made online leave nothing out; one that is too small does."""
    statistics = Fp8Statistics()
    statistics.active = True
    x = row(448.0, 896.0, 1.0, 464.0)
    clipped = quantize(x.clamp(max=448), ROW_TILES, power_of_two=True)
    statistics.observe("experts", "grad", x, clipped)
    (fit,) = fits(*statistics.take()).values()
    assert fit.saturation == 1 / 4, f"{fit}"


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e25], ids=str)
def test_any_magnitude(size: float) -> None:
    """Squares would leave fp32's range."""
    statistics = Fp8Statistics()
    statistics.active = True
    observe(statistics, row(size, 0.3 * size))
    (fit,) = fits(*statistics.take()).values()
    assert 0 < fit.error < 2**-4, f"{fit}"


def test_not_finite() -> None:
    statistics = Fp8Statistics()
    statistics.active = True
    for bad in (math.nan, math.inf):
        observe(statistics, row(1.0, bad))
        observe(statistics, row(1.0, 2.0))
    (fit,) = fits(*statistics.take()).values()
    assert fit.saturation == 1 / 2, f"{fit}: all of two tiles, none of two others"


@pytest.mark.parametrize("tile", [ROW_TILES, BLOCKS], ids=str)
def test_pieces_add_up(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at in pieces, stacks of matrices too, as in one."""
    x = torch.randn(2, 300, 140, generator=torch.Generator().manual_seed(1))
    found = []
    for piece in (1, 2**22):
        monkeypatch.setattr("dist_mtp.precision.fp8.statistics._PIECE", piece)
        statistics = Fp8Statistics()
        statistics.active = True
        statistics.observe("experts", "input", x, quantize(x, tile, power_of_two=False))
        found.append(vars(fits(*statistics.take())["experts", "input"]))
    assert found[0] == pytest.approx(found[1]), f"{found}"


def test_silent_unless_active() -> None:
    statistics = Fp8Statistics()
    observe(statistics, row(1.0))
    assert not fits(*statistics.take())
    statistics.active = True
    observe(statistics, row(1.0))
    assert fits(*statistics.take()).keys() == {("experts", "grad")}
    observe(statistics, row(1.0))
    assert not fits(*statistics.take()), "taking them ends the measurement"


def test_ranks_add_up() -> None:
    """Two ranks that saw different kinds: sums added, extremes maximised, as one rank that saw all."""
    parts = [torch.randn(40, 150, generator=torch.Generator().manual_seed(seed)) * 10**-seed for seed in range(3)]
    kinds = ("attention", "experts", "experts")
    ranks = [Fp8Statistics(), Fp8Statistics()]
    alone = Fp8Statistics()
    for each in (*ranks, alone):
        each.active = True
    for index, (kind, x) in enumerate(zip(kinds, parts, strict=True)):
        for statistics in (ranks[index % 2], alone):
            statistics.observe(kind, "weight", x, quantize(x, BLOCKS, power_of_two=False))
    (sums_0, extremes_0), (sums_1, extremes_1) = (rank.take() for rank in ranks)
    together = fits(
        [a + b for a, b in zip(sums_0, sums_1, strict=True)], list(map(max, zip(extremes_0, extremes_1, strict=True)))
    )
    expected = fits(*alone.take())
    assert together.keys() == expected.keys() == {("attention", "weight"), ("experts", "weight")}
    for key, fit in expected.items():
        assert vars(together[key]) == pytest.approx(vars(fit)), f"{key}: {together[key]} != {fit}"
