"""The Triton kernels: what they compute, in Triton's interpreter, and what they compile to, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

import pytest
import torch
from support.fp8_cases import (
    COUNTS,
    MATRICES,
    SCALES,
    SIZES,
    assert_products,
    assert_same,
    random_matrix,
    require_triton,
    row_tiles,
)
from support.interpreted_kernels import result_of

from dist_mtp.precision.fp8.tiles import BLOCKS, COLUMN_TILES, ROW_TILES, Quantized, quantize


def assert_row_layout(rows: Quantized, multiple: int) -> None:
    """C contiguous, scales with N contiguous, N' a multiple: what cuBLASLt and TMA take without a copy."""
    count, width = rows.values.shape
    assert count % multiple == 0, f"{count} rows, no multiple of {multiple}"
    assert rows.values.stride() == (width, 1), f"values {rows.values.shape} have strides {rows.values.stride()}"
    assert rows.scales.stride() == (1, max(count, 1)), f"scales {rows.scales.shape} have strides {rows.scales.stride()}"


def assert_column_layout(columns: Quantized) -> None:
    """N contiguous, scales with C contiguous, C' a multiple of 16."""
    depth, width = columns.values.shape
    assert width % 16 == 0, f"{width} columns, no multiple of 16"
    assert columns.values.stride() == (1, max(depth, 1)), (
        f"{columns.values.shape} has strides {columns.values.stride()}"
    )
    assert columns.scales.stride() == (width, 1), f"{columns.scales.shape} has strides {columns.scales.stride()}"


@pytest.mark.parametrize("scales", SCALES)
class TestQuantizers:
    """Every kernel gives the bits of ``tiles.quantize``, in the layout that products want.

    A breach: a fast division, a NaN that ``max`` drops, a tile's row too few, padding that is not written.
    """

    @pytest.mark.parametrize("name", MATRICES)
    def test_dense(self, interpreted: dict[Any, Any], name: str, scales: str) -> None:
        x, found = MATRICES[name](), result_of(interpreted, "dense", name, scales)
        rows, columns = (quantize(x, tile, power_of_two=SCALES[scales]) for tile in (ROW_TILES, COLUMN_TILES))
        for what, each in (("alone", found["rows"]), ("with columns", found["both"][0])):
            assert_same(each, rows, f"rows {what}")
            assert_row_layout(each, 16)
        for what, each in (("alone", found["columns"]), ("with rows", found["both"][1])):
            assert_same(each, columns, f"columns {what}")
            assert_column_layout(each)

    @pytest.mark.parametrize("name", COUNTS)
    def test_experts(self, interpreted: dict[Any, Any], name: str, scales: str) -> None:
        """Columns of rows that lie at their experts' places; rows where they were."""
        found, tiles = result_of(interpreted, "experts", name, scales), row_tiles(COUNTS[name])
        x = random_matrix(sum(COUNTS[name]), 140)
        assert_same(found["both"][0], quantize(x, ROW_TILES, power_of_two=SCALES[scales]), "rows")
        assert_row_layout(found["both"][0], 1)
        expected = quantize(tiles.pad(x), COLUMN_TILES, power_of_two=SCALES[scales])
        for what, each in (("alone", found["columns"]), ("with rows", found["both"][1])):
            assert_same(each, expected, f"columns {what}")
            assert_column_layout(each)

    @pytest.mark.parametrize("name", [name for name in MATRICES if name != "no_rows"])
    def test_weight(self, interpreted: dict[Any, Any], name: str, scales: str) -> None:
        x, found = MATRICES[name](), result_of(interpreted, "weight", name, scales)
        for what, weight in (("one", x), ("stack", torch.stack((x.flip(0), x)))):
            expected = quantize(weight, BLOCKS, power_of_two=SCALES[scales])
            for found_blocks, blocks in zip(found[what], (expected, expected.transposed), strict=True):
                assert_same(found_blocks, blocks, what)
                assert found_blocks.values.is_contiguous(), f"{what}: strides {found_blocks.values.stride()}"
                assert found_blocks.scales.is_contiguous(), f"{what}: strides {found_blocks.scales.stride()}"


class TestProducts:
    """Products are those of the quantised numbers, up to fp32's rounding.

    A breach: the scale of a neighbouring tile, rows of a neighbouring expert, an expert without rows whose gradient is not 0.
    """

    @pytest.mark.parametrize("name", SIZES)
    def test_dense(self, interpreted: dict[Any, Any], name: str) -> None:
        assert_products(result_of(interpreted, "triton", name), None)

    @pytest.mark.parametrize("name", COUNTS)
    def test_experts(self, interpreted: dict[Any, Any], name: str) -> None:
        assert_products(result_of(interpreted, "triton", "experts", name), COUNTS[name])

    def test_not_finite(self, interpreted: dict[Any, Any]) -> None:
        """A NaN or an infinity in the input spoils its own row of the output, all of it and nothing else."""
        for name, y in result_of(interpreted, "triton", "not_finite").items():
            finite = y.isfinite()
            assert not finite[3].any(), f"{name}: {finite[3].sum()} finite numbers in the row"
            finite[3] = True
            assert finite.all(), f"{name}: other rows are not finite"


def test_trial(interpreted: dict[Any, Any]) -> None:
    """What a GPU has to pass before ``auto`` takes it: all four products, within bf16's and fp32's rounding here."""
    errors = result_of(interpreted, "triton", "trial")["errors"]
    assert len(errors) == 4, errors
    assert max(errors.values()) < 2**-8, errors


class TestCompiled:
    """What the kernels become on GPUs that this machine may not have.

    A breach: FP8 operands that are widened before they are multiplied, registers that spill to memory, more shared memory
    than there is, divisions that are not rounded as IEEE asks.
    """

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        require_triton()
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    @pytest.mark.parametrize(
        ("capability", "instruction", "shared_kib"),
        [
            (89, r"mma\.sync\S*\.e4m3\.e4m3", 99),
            (90, r"wgmma\.mma_async\S*\.e4m3\.e4m3", 227),
            (100, r"tcgen05\.mma\S*kind::f8f6f4", 227),
            (120, r"mma\.sync\S*\.e4m3\.e4m3", 99),
        ],
    )
    def test_products(self, capability: int, instruction: str, shared_kib: int) -> None:
        from dist_mtp.precision.fp8 import triton_matmul

        matrices = {"a": "*fp8e4nv", "a_scales": "*fp32", "b": "*fp8e4nv", "b_scales": "*fp32"}
        for kernel, types, constants in (
            (triton_matmul._product, matrices | {"out": "*bf16"}, {"GROUPED": True, "TILE_ROWS": 128}),
            (triton_matmul._weight_grad, matrices | {"out": "*fp32"}, {"GROUPED": True}),
        ):
            compiled = compile_kernel(
                kernel, types, constants, capability, num_warps=8, num_stages=triton_matmul.STAGES
            )
            assert re.search(instruction, compiled.asm["ptx"]), f"{kernel.__name__} has no {instruction}"
            shared = compiled.metadata.shared / 1024
            assert shared <= shared_kib, f"{kernel.__name__}: {shared} KiB of shared memory, there are {shared_kib}"
            assert (spilt := stack_bytes(compiled)) == 0, f"{kernel.__name__}: {spilt} bytes of registers spill"

    @pytest.mark.parametrize("power_of_two", [False, True])
    def test_quantizers(self, power_of_two: bool) -> None:
        from dist_mtp.precision.fp8 import triton_quantize

        tiles = {"x": "*bf16", "row_values": "*fp8e4nv", "row_scales": "*fp32", "column_values": "*fp8e4nv"}
        blocks = {"weight": "*bf16", "values": "*fp8e4nv", "scales": "*fp32", "transposed_values": "*fp8e4nv"}
        options = {"POWER_OF_TWO": power_of_two}
        everything = {"x_column_stride": 1, "GROUPED": True, "ROWS": True, "COLUMNS": True}
        for kernel, types, constants in (
            (triton_quantize._quantize_tiles, tiles | {"column_scales": "*fp32"}, everything | options),
            (triton_quantize._quantize_blocks, blocks | {"transposed_scales": "*fp32"}, {"column_stride": 1} | options),
        ):
            ptx = compile_kernel(kernel, types, constants, 90, num_warps=8).asm["ptx"]
            assert "cvt.rn.satfinite.e4m3x2.f32" in ptx, f"{kernel.__name__} does not round fp32 to E4M3 at once"
            assert "div.rn.f32" in ptx, f"{kernel.__name__} does not divide"
            assert not re.search(r"div\.(full|approx)|\.ftz", ptx), (
                f"{kernel.__name__}: fast division or subnormals lost"
            )


def stack_bytes(compiled: Any) -> int:
    """Memory that a thread needs beside its registers."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return sum(map(int, re.findall(r"STACK:(\d+)", usage)))


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, **options: int
) -> Any:
    """Compile for a GPU of that compute capability; arguments without a type are lists or sizes, all multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(place,)] = constants[name]
        else:
            signature[name] = types.get(name, "*i32" if name.endswith(("_T", "_E")) else "i32")
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
