"""What ``DeepGemmBackend`` asks of the ``deep_gemm`` package on Hopper, on the CPU: for tests, not for speed.

Checks what DeepGEMM asserts (release 2.6.1: ``fp8_fp4_gemm_nt`` in csrc/apis/gemm.hpp, ``check_sf_layout`` in
csrc/utils/layout.hpp, ``sm90_fp8_gemm_1d1d`` and ``sm90_fp8_gemm_1d2d`` in csrc/jit_kernels/impls). It takes scales of tiles in
any layout and copies them into the one for TMA; here that copy is a failure.
"""

from __future__ import annotations

import torch
from torch import Tensor

calls: list[tuple[int, int, int]] = []
"""The recipe of each call."""


def fp8_gemm_nt(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    c: Tensor | None = None,
    recipe: tuple[int, int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    recipe = recipe or (1, 128, 128)
    calls.append(recipe)
    (m, k), (n, k_of_b) = a[0].shape, b[0].shape
    assert a[0].dtype == b[0].dtype == torch.float8_e4m3fn, f"{a[0].dtype} times {b[0].dtype}"
    assert a[0].stride(-1) == b[0].stride(-1) == 1, f"strides {a[0].stride()}, {b[0].stride()}: not K-major"
    assert k == k_of_b, f"{a[0].shape} times {b[0].shape} transposed"
    assert k % 16 == 0, f"rows of {k} values are not 16 bytes apart"
    assert d.shape == (m, n), f"output {d.shape} of {m} x {n}"
    assert d.stride() == (n, 1), f"output with strides {d.stride()}"
    assert n * d.element_size() % 16 == 0, f"rows of {n} {d.dtype} are not 16 bytes apart"
    assert set(compiled_dims) <= set("mnk"), compiled_dims
    a_scales = _tile_scales(a[1], m, k)
    if recipe == (1, 1, 128):
        assert c is not None, "this kernel only adds"
        assert d.dtype == torch.float32, f"this kernel adds in fp32, not in {d.dtype}"
        b_scales = _tile_scales(b[1], n, k)
    else:
        assert recipe == (1, 128, 128), f"recipe {recipe}"
        assert c is None, "this kernel does not add"
        assert d.dtype == torch.bfloat16, f"this kernel writes bf16, not {d.dtype}"
        assert n % 8 == 0, f"{n} columns"
        b_scales = _block_scales(b[1], n, k)
    product = (a[0].float().double() * a_scales) @ (b[0].float().double() * b_scales).t()
    d.copy_(product if c is None else product + c)


def _tile_scales(scales: Tensor, size: int, k: int) -> Tensor:
    """[size, K] from [size, K / 128], the size contiguous and padded to 16 bytes."""
    sums = -(-k // 128)
    assert scales.dtype == torch.float32, f"scales in {scales.dtype}"
    assert scales.shape == (size, sums), f"scales {scales.shape}, wanted {(size, sums)}"
    strides = (1, -(-size // 4) * 4)
    assert scales.stride() == strides, f"scales with strides {scales.stride()}, wanted {strides}"
    return scales.double().repeat_interleave(128, 1)[:, :k]


def _block_scales(scales: Tensor, n: int, k: int) -> Tensor:
    blocks, sums = -(-n // 128), -(-k // 128)
    assert scales.dtype == torch.float32, f"scales in {scales.dtype}"
    assert scales.shape == (blocks, sums), f"scales {scales.shape}, wanted {(blocks, sums)}"
    assert scales.is_contiguous() or scales.t().is_contiguous(), f"scales with strides {scales.stride()}"
    return scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
