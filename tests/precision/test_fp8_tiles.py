"""Quantisation: the recipe's numbers, bit for bit, at every size and magnitude."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from precision import fp8_reference
from torch import Tensor

from dist_mtp.precision.fp8.packed import pack, unpack
from dist_mtp.precision.fp8.tiles import (
    BLOCKS,
    COLUMN_TILES,
    E4M3,
    ROW_TILES,
    Quantized,
    RowTiles,
    _to_fp32,
    quantize,
)

TILES = {"rows": ROW_TILES, "columns": COLUMN_TILES, "blocks": BLOCKS}


def numbers(*shape: int, seed: int = 1) -> Tensor:
    """Magnitudes from 1e-9 to 1e3 in bf16, some of them zero, and one tile of zeros if there is room."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 10 ** (6 * torch.rand(*shape, generator=generator) - 3)
    x = x * 10.0 ** torch.randint(-6, 1, (*shape[:-1], 1), generator=generator)
    x[torch.rand(*shape, generator=generator) < 0.05] = 0
    x[..., :128, :128] = 0 if shape[-1] > 256 else x[..., :128, :128]
    return x.bfloat16()


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any_scale", "power_of_two"])
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (130, 3), (128, 256), (129, 300)], ids=str)
def test_equals_reference(shape: tuple[int, int], tile: tuple[int, int], power_of_two: bool) -> None:
    """Values and scales are the reference's to the last bit; beyond the matrix values are zero."""
    x = numbers(*shape)
    found = quantize(x, tile, power_of_two=power_of_two)
    values, scales, products = fp8_reference.quantize(x.double().numpy(), tile, power_of_two=power_of_two)
    rows, columns = shape
    padded = tuple(-(-size // step) * step for size, step in zip(shape, tile, strict=True))
    assert found.values.dtype == E4M3
    assert found.values.shape == padded, f"{tuple(found.values.shape)} != {padded}"
    assert (found.scales.numpy() == scales).all(), f"{found.scales} != {scales}"
    wide = found.values.double().numpy()
    inside = wide[:rows, :columns]
    assert (inside == values).all(), f"{inside[inside != values]} != {values[inside != values]}"
    assert (np.signbit(inside) == np.signbit(values)).all()
    assert not wide[rows:].any()
    assert not wide[:, columns:].any()
    # One rounding to fp32, of the product with the scale.
    assert np.array_equal(found.dequantize().numpy(), products.astype(np.float32))


def test_power_of_two_scales_are_the_next_ones() -> None:
    """At 448, 224 and just above them; then quantising again changes nothing."""
    for amax, expected in ((448.0, 1.0), (448.001, 2.0), (224.0, 0.5), (3.0, 2.0**-7), (1e-30, 2.0**-108)):
        x = torch.tensor([[amax, amax / 3, -amax / 1000]])
        found = quantize(x, ROW_TILES, power_of_two=True)
        assert found.scales.item() == expected, f"amax {amax}: scale {found.scales.item()} != {expected}"
        again = quantize(found.dequantize(), ROW_TILES, power_of_two=True)
        assert torch.equal(again.dequantize(), found.dequantize()), f"amax {amax}: {again} != {found}"


def test_every_code_of_e4m3() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    expected = codes.float().nan_to_num(nan=480.0).copysign(torch.where(torch.arange(256) < 128, 1.0, -1.0))
    assert torch.equal(_to_fp32(codes), expected), f"{_to_fp32(codes)} != {expected}"


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any_scale", "power_of_two"])
def test_smallest_and_infinite(power_of_two: bool) -> None:
    """Nothing overflows on the way: tiles of denormals become 0. A tile that is not finite does not become so."""
    for tiny in (2.0**-149, 2.0**-130):
        found = quantize(torch.tensor([[tiny, -tiny]]), ROW_TILES, power_of_two=power_of_two).dequantize()
        assert found.tolist() == [[0.0, 0.0]], f"{tiny} became {found.tolist()}"
    largest = torch.tensor([[1e38, -3e37, 1.0]])
    found = quantize(largest, ROW_TILES, power_of_two=power_of_two).dequantize()
    assert torch.allclose(found, largest, rtol=2**-4, atol=1e38 * 2**-17), f"{found} != {largest}"
    for bad in (math.inf, -math.inf, math.nan):
        found = quantize(torch.tensor([[1.0, bad, 2.0]]), ROW_TILES, power_of_two=power_of_two).dequantize()
        assert not found[0, 1].isfinite(), f"{bad} became {found[0, 1].item()}"
        packed = pack(quantize(torch.tensor([[1.0, bad, 2.0]]), ROW_TILES, power_of_two=True))
        arrived = unpack(packed, 3).dequantize()
        assert not arrived[0, 1].isfinite(), f"{bad} arrived as {arrived[0, 1].item()}"


@pytest.mark.parametrize("shape", [(5, 130), (1, 128), (0, 64)], ids=str)
def test_packed_rows_travel_unchanged(shape: tuple[int, int]) -> None:
    rows = quantize(numbers(*shape), ROW_TILES, power_of_two=True)
    packed = pack(rows)
    padded = shape[1] + -shape[1] % 128
    assert packed.shape == (shape[0], padded + padded // 128), f"{tuple(packed.shape)}"
    assert torch.equal(unpack(packed, shape[1]).dequantize(), rows.dequantize())


def test_transposed_is_the_transpose() -> None:
    x = numbers(2, 130, 300)
    found = quantize(x, BLOCKS, power_of_two=False).transposed
    expected = quantize(x.mT, BLOCKS, power_of_two=False)
    assert torch.equal(found.dequantize(), expected.dequantize())
    assert found.shape == expected.shape == (2, 300, 130)


class TestRowTiles:
    """Tiles of at most 128 rows, each of one expert; padding puts every expert's first row at the start of a tile."""

    def test_documented_example(self) -> None:
        tiles = RowTiles.of(torch.tensor([130, 130, 135], dtype=torch.int32), 135)
        found = [t.tolist() for t in (tiles.expert_T, tiles.first_T, tiles.rows_T, tiles.padded_ends_E)]
        expected = [[0, 0, 2], [0, 128, 130], [128, 2, 5], [256, 256, 384]]
        assert found == expected, f"{found} != {expected}"

    @pytest.mark.parametrize("counts", [[0, 3, 0], [128, 1, 256], [0, 0], [300, 0, 0, 129]], ids=str)
    def test_pad_then_quantize_is_each_expert_alone(self, counts: list[int]) -> None:
        x = numbers(sum(counts), 40)
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        tiles = RowTiles.of(ends, sum(counts))
        found = quantize(tiles.pad(x), COLUMN_TILES, power_of_two=False)
        alone: list[Quantized] = [quantize(part, COLUMN_TILES, power_of_two=False) for part in x.split(counts)]
        expected = torch.cat([q.values.float() for q in alone])
        assert torch.equal(found.values.float(), expected), f"{found.values.float()} != {expected}"
        assert torch.equal(found.scales, torch.cat([q.scales for q in alone]))
        assert tiles.padded_ends_E[-1] == len(expected)
