"""Matrices, experts and reference products for tests of FP8 kernels, on any device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dist_mtp.precision.fp8.tiles import MIN_AMAX, Quantized, RowTiles


def random_matrix(*shape: int, seed: int = 1, spread: float = 3.0) -> Tensor:
    """Normal numbers whose 128-wide tiles differ in magnitude, so that a scale at the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    for dim in (-1, -2):
        magnitudes = torch.exp2(spread * torch.randn(-(-shape[dim] // 128), generator=generator))
        per_value = magnitudes.repeat_interleave(128)[: shape[dim]]
        x = x * (per_value if dim == -1 else per_value[:, None])
    return x


def _with(value: float) -> Tensor:
    x = random_matrix(130, 200)
    x[3, 150] = value
    return x


MATRICES: dict[str, Callable[[], Tensor]] = {
    "1x1": lambda: random_matrix(1, 1),
    "5x130": lambda: random_matrix(5, 130),
    "300x257": lambda: random_matrix(300, 257),
    "whole_tiles_bf16": lambda: random_matrix(256, 384).bfloat16(),
    "ragged_bf16": lambda: random_matrix(131, 72).bfloat16(),
    "no_rows": lambda: random_matrix(0, 130),
    "zeros": lambda: torch.zeros(3, 140),
    # From below the smallest amax, where the scale stops shrinking, down to fp32's subnormal numbers.
    "tiny": lambda: MIN_AMAX * torch.exp2(-torch.arange(140.0)).expand(4, 140).contiguous() * torch.tensor([1, -1]).repeat(70),
    "largest": lambda: torch.full((2, 130), torch.finfo(torch.float32).max),
    "nan": lambda: _with(torch.nan),
    "inf": lambda: _with(torch.inf),
    "transposed": lambda: random_matrix(140, 150).t(),
    "expanded": lambda: random_matrix(1, 140).expand(135, 140),
}  # fmt: skip

COUNTS = {
    "uneven": [130, 0, 5],
    "whole_tiles": [128, 256],
    "empty_at_both_ends": [0, 7, 0, 129, 0],
    "one_row": [0, 1],
    "no_rows": [0, 0],
}

SCALES = {"any_scale": False, "powers_of_two": True}
"""``power_of_two`` by name."""

SIZES = {
    "1x16x128": (1, 16, 128),
    "5x130x200": (5, 130, 200),
    "300x257x130": (300, 257, 130),
    "130x128x640": (130, 128, 640),
    "no_rows": (0, 130, 200),
}
"""Rows, outputs and inputs of products; 640 is five blocks, so no multiple of four."""


def row_tiles(counts: list[int], device: str = "cpu") -> RowTiles:
    return RowTiles.of(torch.tensor(counts).cumsum(0).to(torch.int32).to(device), sum(counts))


def exact(matrix: Quantized) -> Tensor:
    """values * scales in float64."""
    scales = matrix.scales.double().repeat_interleave(matrix.tile[0], -2).repeat_interleave(matrix.tile[1], -1)
    rows, columns = matrix.shape[-2:]
    return (matrix.values.float().double() * scales)[..., :rows, :columns]


def exact_product(rows: Quantized, weight: Quantized, counts: list[int] | None) -> tuple[Tensor, Tensor]:
    """``Fp8Backend.product`` in float64, and the same of the magnitudes, which rounding errors are relative to."""
    a, b = exact(rows), exact(weight).mT
    if counts is None:
        return a @ b, a.abs() @ b.abs()
    parts = [(part @ b[expert], part.abs() @ b[expert].abs()) for expert, part in enumerate(a.split(counts))]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def exact_weight_grad(grad: Quantized, x: Quantized, counts: list[int] | None) -> tuple[Tensor, Tensor]:
    """``Fp8Backend.weight_grad`` in float64, and the same of the magnitudes."""
    a, b = exact(grad), exact(x)
    if counts is None:
        return a.t() @ b, a.t().abs() @ b.abs()
    padded = [-(-count // 128) * 128 for count in counts]
    used = sum(padded)
    pairs = list(zip(a[:used].split(padded), b[:used].split(padded), strict=True))
    return torch.stack([g.t() @ x for g, x in pairs]), torch.stack([g.t().abs() @ x.abs() for g, x in pairs])


def assert_equals(found: Tensor, exact: Tensor, bound: Tensor, what: str) -> None:
    """|found - exact| <= bound everywhere; the message has the worst place."""
    assert found.shape == exact.shape, f"{what}: {tuple(found.shape)} != {tuple(exact.shape)}"
    excess = (found.double() - exact).abs() - bound
    if excess.numel() == 0:
        return
    place = int(excess.nan_to_num(nan=torch.inf).argmax())
    assert bool((excess <= 0).all()), (
        f"{what}: {found.flatten()[place]} != {exact.flatten()[place]} at {place}, bound {bound.flatten()[place]}"
    )


def fp32_bound(exact: Tensor, magnitudes: Tensor, depth: int, dtype: torch.dtype) -> Tensor:
    """What rounding may cost a sum of products in E4M3 where every addition is one in fp32.

    Products are exact. Each of ``depth`` / 128 sums rounds 127 times, is multiplied by a product of scales (rounded, as its
    result) and added; each time by 2^-24 of at most ``magnitudes``. The output is rounded once to ``dtype``.
    """
    roundings = 127 + 2 + -(-depth // 128)
    output = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]
    return 1.001 * (roundings * 2.0**-24 * magnitudes + output * exact.abs())


def assert_same(found: Quantized, expected: Quantized, what: str) -> None:
    """Bit for bit, NaN aside; beyond the matrix the values are zero."""
    assert found.shape == expected.shape, f"{what}: shape {found.shape} != {expected.shape}"
    assert found.tile == expected.tile, f"{what}: tile {found.tile} != {expected.tile}"
    rows, columns = expected.scales.shape[-2:]
    torch.testing.assert_close(
        found.scales[..., :rows, :columns],
        expected.scales,
        rtol=0,
        atol=0,
        equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )
    bits, expected_bits = (_bits(each.values) for each in (found, expected))
    rows, columns = (min(sizes) for sizes in zip(bits.shape[-2:], expected_bits.shape[-2:], strict=True))
    wrong = bits[..., :rows, :columns] != expected_bits[..., :rows, :columns]
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} values differ, at {wrong.nonzero()[:3]}"
    for beyond in (found.values[..., found.shape[-2] :, :], found.values[..., found.shape[-1] :]):
        finite = beyond.float().nan_to_num()  # zeros times the inverse of a tile that is not finite are NaN
        assert not finite.any(), f"{what}: values beyond {found.shape} are not zero"


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Bits of E4M3 numbers, all NaNs alike."""
    bits = values.view(torch.uint8)
    return torch.where(bits & 0x7F == 0x7F, 0x7F, bits)


def assert_products(products: dict[str, tuple[Quantized, Quantized, Tensor]], counts: list[int] | None) -> None:
    """Forward, backward and weight gradient, each with its operands, are exact up to :func:`fp32_bound`."""
    for name, (a, b, found) in products.items():
        exact, magnitudes, depth = exact_result(name, a, b, counts)
        assert_equals(found, exact, fp32_bound(exact, magnitudes, depth, found.dtype), name)


def exact_result(name: str, a: Quantized, b: Quantized, counts: list[int] | None) -> tuple[Tensor, Tensor, int]:
    """Exact, of magnitudes, and how many products are summed."""
    if name == "weight_grad":
        return *exact_weight_grad(a, b, counts), a.shape[0]
    return *exact_product(a, b, counts), a.shape[1]


def require_triton() -> None:
    """Skip without the one version whose interpreter and compiler these tests know."""
    triton = pytest.importorskip("triton", reason="package triton is not installed")
    if not triton.__version__.startswith("3.6."):
        pytest.skip(f"needs triton 3.6, found {triton.__version__}")
