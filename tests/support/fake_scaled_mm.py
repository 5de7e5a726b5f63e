"""``torch.nn.functional.scaled_mm`` for tiles of 1 x 128 and blocks of 128 x 128, on the CPU.

Refuses what torch and cuBLASLt refuse on compute capability 9.0 (``_scaled_mm_cuda_v2_out`` and below in
aten/src/ATen/native/cuda/ScaledBlas.cpp, torch 2.10 to 2.13), and reads scales as cuBLASLt does: from where they start, in its
own layout, whatever strides the tensor claims.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import ScalingType

TILES, BLOCKS = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
calls: list[str] = []
"""The second matrix's recipe in each call."""


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_recipe_a: ScalingType,
    scale_b: Tensor,
    scale_recipe_b: ScalingType,
    *,
    output_dtype: torch.dtype,
) -> Tensor:
    calls.append(scale_recipe_b.name)
    (m, k), (k_of_b, n) = mat_a.shape, mat_b.shape
    assert mat_a.dtype == mat_b.dtype == torch.float8_e4m3fn, f"{mat_a.dtype} times {mat_b.dtype}"
    assert k == k_of_b, f"{mat_a.shape} times {mat_b.shape}"
    assert min(m, n, k) > 0, f"empty: {m} x {k} times {k} x {n}"
    assert k % 16 == 0, f"{k} summed values, no multiple of 16"
    assert n % 16 == 0, f"{n} columns, no multiple of 16"
    assert m % 4 == 0, f"{m} rows, no multiple of 4"
    assert mat_a.stride() == (k, 1), f"first matrix {mat_a.shape} with strides {mat_a.stride()} is not row-major"
    assert mat_b.stride() == (1, k), f"second matrix {mat_b.shape} with strides {mat_b.stride()} is not column-major"
    assert output_dtype in (torch.bfloat16, torch.float16, torch.float32), f"output in {output_dtype}"
    assert scale_recipe_a == TILES, f"first matrix in {scale_recipe_a}"
    assert scale_recipe_b in (TILES, BLOCKS), f"second matrix in {scale_recipe_b}"
    sums = -(-k // 128)
    a = mat_a.float().double() * _tile_scales(scale_a, m, sums).repeat_interleave(128, 1)[:, :k]
    if scale_recipe_b == TILES:
        expanded = _tile_scales(scale_b, n, sums).t().repeat_interleave(128, 0)
    else:
        expanded = _block_scales(scale_b, sums, -(-n // 128)).repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (a @ (mat_b.float().double() * expanded[:k, :n])).to(output_dtype)


def _tile_scales(scales: Tensor, size: int, sums: int) -> Tensor:
    """[size, sums] with strides (1, size)."""
    _check(scales, (size, sums), size)
    return scales.as_strided((size, sums), (1, size)).double()


def _block_scales(scales: Tensor, sums: int, blocks: int) -> Tensor:
    """[sums, blocks], of which [sums rounded up to 4, blocks] is stored, with strides (1, that)."""
    stored = -(-sums // 4) * 4
    _check(scales, (stored, blocks), stored)
    return scales.as_strided((sums, blocks), (1, stored)).double()


def _check(scales: Tensor, shape: tuple[int, int], stride: int) -> None:
    assert scales.dtype == torch.float32, f"scales in {scales.dtype}"
    assert scales.shape == shape, f"scales {scales.shape}, wanted {shape}"
    strides = scales.stride()
    assert strides == (1, stride) or (shape[1] == 1 and strides == (1, 1)), f"strides {strides}, wanted (1, {stride})"
    assert scales.data_ptr() % 16 == 0, "scales do not start at a multiple of 16 bytes"
