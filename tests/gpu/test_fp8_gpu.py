"""FP8 on a GPU: kernels against the recipe in plain torch on the same device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.fp8_cases import (
    COUNTS,
    MATRICES,
    SIZES,
    assert_equals,
    assert_same,
    exact_result,
    random_matrix,
    row_tiles,
)
from support.interpreted_kernels import products, quantized, weights

from dist_mtp.precision.fp8 import deep_gemm, scaled_mm
from dist_mtp.precision.fp8.tiles import BLOCKS, COLUMN_TILES, ROW_TILES, RowTiles, quantize

CUDA = torch.device("cuda")
LACKS = scaled_mm.problem(CUDA)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(LACKS), reason=f"needs a GPU with FP8: {LACKS}")]

LARGE = {"1000x1536x1152": (1000, 1536, 1152), "4096x576x7168": (4096, 576, 7168)}
MANY = {"8_experts": [300, 0, 1, 128, 513, 127, 0, 255]}

ELEMENTWISE, OVERALL = 2.0**-5, 2.0**-8
"""Bounds relative to the sum of magnitudes and, of norms, to the result. Hopper's tensor cores align 32 products, and what they
have summed so far, to the largest and keep 14 bits (arXiv 2412.19437, section 3.5.2). So each of the four times in 128 they
drop less than 33 * 2^-13 of the largest. Signs vary, so the norm's error is that of random numbers: about 2^-10 of it."""


@pytest.mark.parametrize("power_of_two", [False, True])
class TestQuantizers:
    """Bit for bit what ``tiles.quantize`` gives on the same device.

    A breach: a cast that rounds twice or saturates otherwise, a division that is not rounded as IEEE asks, lost subnormals.
    """

    @pytest.mark.parametrize("name", MATRICES)
    def test_dense(self, name: str, power_of_two: bool) -> None:
        x = MATRICES[name]().to(CUDA)
        found = quantized(scaled_mm.TorchBackend(), x, None, power_of_two)
        rows, columns = (quantize(x, tile, power_of_two=power_of_two) for tile in (ROW_TILES, COLUMN_TILES))
        for each in (found["rows"], found["both"][0]):
            assert_same(each, rows, "rows")
        for each in (found["columns"], found["both"][1]):
            assert_same(each, columns, "columns")

    @pytest.mark.parametrize("name", [name for name in MATRICES if name != "no_rows"])
    def test_weight(self, name: str, power_of_two: bool) -> None:
        x = MATRICES[name]().to(CUDA)
        forward, backward = weights(scaled_mm.TorchBackend(), x, power_of_two)["one"]
        blocks = quantize(x, BLOCKS, power_of_two=power_of_two)
        assert_same(forward, blocks, "weight")
        assert_same(backward, blocks.transposed, "transposed weight")

    @pytest.mark.parametrize("counts", (COUNTS | MANY).values(), ids=COUNTS | MANY)
    def test_experts(self, counts: list[int], power_of_two: bool) -> None:
        x, tiles = random_matrix(sum(counts), 1152).to(CUDA), row_tiles(counts, "cuda")
        found = quantized(scaled_mm.TorchBackend(), x, tiles, power_of_two)
        assert_same(found["both"][0], quantize(x, ROW_TILES, power_of_two=power_of_two), "rows")
        expected = quantize(tiles.pad(x), COLUMN_TILES, power_of_two=power_of_two)
        for each in (found["columns"], found["both"][1]):
            assert_same(each, expected, "columns")


@pytest.fixture(params=["scaled_mm", "triton", "deep_gemm"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What multiplies dense matrices; experts' are multiplied by Triton in any case."""
    if request.param == "deep_gemm":
        if reason := deep_gemm.problem(CUDA):
            pytest.skip(f"deep_gemm: {reason}")
        return deep_gemm.DeepGemmBackend()
    if request.param == "scaled_mm" and not scaled_mm.has_scaled_mm(CUDA):
        pytest.skip("F.scaled_mm has no tiles here: needs compute capability 9.0 and CUDA 12.9")
    if request.param == "triton":
        monkeypatch.setattr(scaled_mm, "has_scaled_mm", lambda device: False)
    return scaled_mm.TorchBackend()


class TestProducts:
    """Products of each backend are those of the quantised numbers, up to what tensor cores drop.

    A breach: wrong layouts of scales, which some kernels multiply without complaint; sums that are not promoted to fp32.
    """

    @pytest.mark.parametrize("sizes", (SIZES | LARGE).values(), ids=SIZES | LARGE)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_dense(self, backend: Any, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
        assert_products(products(backend, *sizes, None, dtype, "cuda"), None)

    @pytest.mark.parametrize("counts", (COUNTS | MANY).values(), ids=COUNTS | MANY)
    def test_experts(self, counts: list[int]) -> None:
        found = products(scaled_mm.TorchBackend(), sum(counts), 640, 1152, counts, torch.float32, "cuda")
        assert_products(found, counts)
        gradient = found["weight_grad"][2]
        for expert, count in enumerate(counts):
            assert count or not gradient[expert].any(), f"expert {expert} has no rows but a gradient"


class TestNoWaits:
    """The host never waits for the device, neither for dense layers nor for experts.

    A breach: sizes read back from the device; training then stalls in every layer.
    """

    @pytest.fixture
    def waits_are_errors(self) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("counts", [None, MANY["8_experts"]], ids=["dense", "experts"])
    def test_layer(self, counts: list[int] | None, request: pytest.FixtureRequest) -> None:
        backend = scaled_mm.TorchBackend()
        num_rows = 1000 if counts is None else sum(counts)
        stack = () if counts is None else (len(counts),)
        x, weight = random_matrix(num_rows, 1152).to(CUDA), random_matrix(*stack, 640, 1152).to(CUDA)
        ends = None if counts is None else torch.tensor(counts).cumsum(0).to(torch.int32).to(CUDA)

        def layer() -> None:
            tiles = None if ends is None else RowTiles.of(ends, num_rows)
            rows, columns = backend.quantize_both(x, tiles, power_of_two=False)
            forward, _ = backend.quantize_weight(weight, power_of_two=False)
            y = backend.product(rows, forward, tiles, torch.float32)
            backend.weight_grad(backend.quantize_columns(y, tiles, power_of_two=False), columns, tiles)

        layer()  # compiles, and takes memory from CUDA
        request.getfixturevalue("waits_are_errors")
        layer()


def assert_products(found: dict[str, Any], counts: list[int] | None) -> None:
    for name, (a, b, result) in found.items():
        exact, magnitudes, _ = exact_result(name, a, b, counts)
        rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}[result.dtype]
        assert_equals(result, exact, ELEMENTWISE * magnitudes + rounding * exact.abs(), name)
        error, size = float((result.double() - exact).norm()), float(exact.norm())
        assert error <= (OVERALL + rounding) * size, f"{name}: error {error} of {size}"
