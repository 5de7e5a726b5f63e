"""The backend of NVIDIA GPUs: Triton quantises, cuBLASLt multiplies where it can, Triton where it cannot."""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from dist_mtp.precision.fp8.backend import Fp8Backend
from dist_mtp.precision.fp8.tiles import Quantized, RowTiles

# The modules with kernels are imported where they are called: Triton need not be installed for this one.


_TRIAL_BOUND = 2.0**-6
"""Four times what tensor cores' 14 bits explain."""


class TorchBackend:
    """Dense products by ``torch.nn.functional.scaled_mm`` on Hopper, all else by our Triton kernels."""

    name = "torch"

    def quantize_rows(self, x: Tensor, *, power_of_two: bool) -> Quantized:
        from dist_mtp.precision.fp8 import triton_quantize

        return triton_quantize.quantize_rows(x, power_of_two=power_of_two)

    def quantize_columns(self, x: Tensor, tiles: RowTiles | None, *, power_of_two: bool) -> Quantized:
        from dist_mtp.precision.fp8 import triton_quantize

        return triton_quantize.quantize_columns(x, tiles, power_of_two=power_of_two)

    def quantize_both(self, x: Tensor, tiles: RowTiles | None, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
        from dist_mtp.precision.fp8 import triton_quantize

        return triton_quantize.quantize_both(x, tiles, power_of_two=power_of_two)

    def quantize_weight(self, weight: Tensor, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
        from dist_mtp.precision.fp8 import triton_quantize

        return triton_quantize.quantize_weight(weight, power_of_two=power_of_two)

    def product(self, rows: Quantized, weight: Quantized, tiles: RowTiles | None, dtype: torch.dtype) -> Tensor:
        from dist_mtp.precision.fp8 import triton_matmul

        if tiles is None and _suits_scaled_mm(rows.values):
            return _scaled_product(rows, weight, dtype)
        return triton_matmul.product(rows, weight, tiles, dtype)

    def weight_grad(self, grad: Quantized, x: Quantized, tiles: RowTiles | None) -> Tensor:
        from dist_mtp.precision.fp8 import triton_matmul

        if tiles is None and _suits_scaled_mm(grad.values):
            return _scaled_weight_grad(grad, x)
        return triton_matmul.weight_grad(grad, x, tiles)


def problem(device: torch.device) -> str:
    """Why :class:`TorchBackend` cannot run on a device; empty where it can."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device"
    if capability(device) < (9, 0):
        # 8.9 has E4M3, too, but Triton 3.6 casts to it by way of fp16, which rounds twice.
        return "compute capability {}.{}, needs 9.0 or newer".format(*capability(device))
    if importlib.util.find_spec("triton") is None:
        return "package triton is not installed"
    return _trial(device)


@functools.cache
def _trial(device: torch.device) -> str:
    """What goes wrong with three small products, which need a compiler, a driver and libraries that fit each other."""
    try:
        errors = trial_errors(TorchBackend(), device)
    except Exception as error:  # of Triton's compilers, of the driver or of cuBLASLt: all sorts
        return f"a trial product failed: {type(error).__name__}: {error}"
    wrong = {name: error for name, error in errors.items() if not error < _TRIAL_BOUND}
    return f"trial products are wrong, relative errors {wrong}" if wrong else ""


def trial_errors(backend: Fp8Backend, device: torch.device) -> dict[str, float]:
    """Relative errors of a backend's dense and grouped products, with sizes of no whole tiles, against the emulation's."""
    from dist_mtp.precision.fp8.emulated import EmulatedBackend

    generator = torch.Generator().manual_seed(1)
    x, grad, weight, weights = (
        torch.randn(*shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((150, 200), (150, 136), (136, 200), (2, 136, 200))
    )
    experts = RowTiles.of(torch.tensor([20, 150], dtype=torch.int32, device=device), len(x))
    results: list[dict[str, Tensor]] = []
    for each in (backend, EmulatedBackend()):
        result = {}
        for kind, tiles, stack in (("dense", None, weight), ("grouped", experts, weights)):
            rows, columns = each.quantize_both(x, tiles, power_of_two=False)
            forward, _ = each.quantize_weight(stack, power_of_two=False)
            result[f"{kind} product"] = each.product(rows, forward, tiles, torch.bfloat16)
            grad_columns = each.quantize_columns(grad, tiles, power_of_two=False)
            result[f"{kind} weight gradient"] = each.weight_grad(grad_columns, columns, tiles)
        results.append(result)
    found, expected = results
    return {
        name: float((found[name].float() - right.float()).norm() / right.float().norm())
        for name, right in expected.items()
    }


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, such as (9, 0) for Hopper."""
    return torch.cuda.get_device_capability(device)


def has_scaled_mm(device: torch.device) -> bool:
    """Whether ``F.scaled_mm`` takes tiles of 1 x 128 and blocks of 128 x 128.

    cuBLASLt does on compute capability 9.0 alone, from CUDA 12.9: ``_check_deepseek_support`` in torch's
    aten/src/ATen/native/cuda/ScaledBlas.cpp. Elsewhere the call raises NotImplementedError.
    """
    version = torch.version.cuda
    if device.type != "cuda" or version is None:
        return False
    return tuple(map(int, version.split(".")[:2])) >= (12, 9) and capability(device) == (9, 0)


def _suits_scaled_mm(values: Tensor) -> bool:
    """Nor does it take empty matrices; our kernels then launch nothing, or store zeros."""
    return values.numel() > 0 and has_scaled_mm(values.device)


# Layouts that cuBLASLt wants (checked in ``_scaled_block1x128_block128x128`` and ``_scaled_block1x128_block1x128`` of
# ScaledBlas.cpp, torch 2.10 to 2.13), for [M, K] times [K, N] with L = K / 128:
# - the first matrix row-major, the second column-major; N and K multiples of 16. Rows must be a multiple of 4, which torch
#   does not check (vllm-project/vllm#49932); ours are one of 16.
# - scales of 1 x 128 tiles: [M, L] and [N, L], the second not transposed, with strides (1, M) and (1, N).
# - scales of 128 x 128 blocks: [L4, N / 128] with strides (1, L4), where L4 is L rounded up to a multiple of 4. Before
#   pytorch/pytorch#166752 a scale tensor without that padding gave wrong numbers silently.


def _scaled_product(rows: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
    num_rows, num_columns = rows.shape[0], weight.shape[-2]
    columns = num_columns + -num_columns % 16
    missing = -weight.scales.shape[1] % 4
    block_scales = F.pad(weight.scales, (0, missing)) if missing else weight.scales  # without, F.pad copies
    product = F.scaled_mm(
        rows.values,
        weight.values[:columns].t(),
        rows.scales,
        ScalingType.BlockWise1x128,
        block_scales.t(),
        ScalingType.BlockWise128x128,
        output_dtype=dtype,
    )
    return product[:num_rows, :num_columns].contiguous()


def _scaled_weight_grad(grad: Quantized, x: Quantized) -> Tensor:
    product = F.scaled_mm(
        grad.values.t(),
        x.values,
        grad.scales.t(),
        ScalingType.BlockWise1x128,
        x.scales.t(),
        ScalingType.BlockWise1x128,
        output_dtype=torch.float32,
    )
    return product[: grad.shape[1], : x.shape[1]].contiguous()
