"""Dense products by DeepGEMM (https://github.com/deepseek-ai/DeepGEMM), where that library is installed.

Written after its releases 2.1.1 to 2.6.1 (``csrc/apis/gemm.hpp``, ``csrc/utils/layout.hpp``); so far it has run against a
stand-in only, never against the library.

Grouped products stay with :class:`TorchBackend`: DeepGEMM's want each expert's rows padded to 128 already in the input of the
forward, and the sizes of the experts on the host for the weight gradient, so the host would wait for the device.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from dist_mtp.precision.fp8 import scaled_mm
from dist_mtp.precision.fp8.scaled_mm import TorchBackend
from dist_mtp.precision.fp8.tiles import Quantized, RowTiles

_FUNCTION = "fp8_gemm_nt"
"""``fp8_gemm_nt((a, a_scales), (b, b_scales), d, c=None, recipe=None, ..)``: d = c + a b^T, for [M, K] and [N, K]."""


class DeepGemmBackend(TorchBackend):
    name = "deep_gemm"

    def product(self, rows: Quantized, weight: Quantized, tiles: RowTiles | None, dtype: torch.dtype) -> Tensor:
        if tiles is not None or dtype != torch.bfloat16 or rows.values.numel() == 0:
            return super().product(rows, weight, tiles, dtype)
        # Scales of row tiles lie as TMA wants them, rows contiguous and their number a multiple of 4: nothing is copied.
        out = rows.values.new_empty((rows.values.shape[0], weight.values.shape[0]), dtype=dtype)
        _gemm((rows.values, rows.scales), (weight.values, weight.scales), out)
        return out[: rows.shape[0], : weight.shape[0]].contiguous()

    def weight_grad(self, grad: Quantized, x: Quantized, tiles: RowTiles | None) -> Tensor:
        if tiles is not None or grad.values.numel() == 0:
            return super().weight_grad(grad, x, tiles)
        out = grad.values.new_zeros((grad.values.shape[1], x.values.shape[1]), dtype=torch.float32)
        # With tiles on both sides Hopper's kernel only adds, and only to fp32 (sm90_fp8_gemm_1d1d). The number of tokens
        # is left out of what it compiles for.
        _gemm(
            (grad.values.t(), grad.scales.t()),
            (x.values.t(), x.scales.t()),
            out,
            c=out,
            recipe=(1, 1, 128),
            compiled_dims="mn",
        )
        return out[: grad.shape[1], : x.shape[1]].contiguous()


def problem(device: torch.device) -> str:
    """Why :class:`DeepGemmBackend` cannot run on a device; empty where it can."""
    if reason := scaled_mm.problem(device):
        return reason
    if scaled_mm.capability(device) != (9, 0):
        # On 10.0 it packs scales into exponents, and drops what is no power of two.
        return "compute capability {}.{}, needs 9.0".format(*scaled_mm.capability(device))
    if importlib.util.find_spec("deep_gemm") is None:
        return "package deep_gemm is not installed"
    try:
        found = hasattr(importlib.import_module("deep_gemm"), _FUNCTION)
    except Exception as error:  # whatever a compiled extension raises that was built for another torch or CUDA
        return f"package deep_gemm cannot be imported: {error}"
    # PyPI's deep-gemm 1.0.0 holds the name and nothing else.
    return "" if found else f"package deep_gemm has no {_FUNCTION}: install release 2.1 or newer from its repository"


def _gemm(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor, **options: object) -> None:
    getattr(importlib.import_module("deep_gemm"), _FUNCTION)(a, b, out, **options)
