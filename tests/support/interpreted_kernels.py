"""Our Triton kernels on the CPU, in a process of their own: Triton decides at its import whether it interprets.

``run_all`` is for ``support.ranks.run_ranks`` with one rank. It leaves in ``results.pt``, by suite and case, what backends gave,
or the traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from support import fake_deep_gemm, fake_scaled_mm
from support.fp8_cases import COUNTS, MATRICES, SCALES, SIZES, random_matrix, row_tiles

from dist_mtp.precision.fp8 import deep_gemm, scaled_mm
from dist_mtp.precision.fp8.tiles import RowTiles

Result = dict[str, Any]


def run_all(folder: Path) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    _mend_interpreter()
    results: dict[Any, Result | str] = {}

    def record(key: tuple[str, ...], function: Callable[..., Result], *args: Any) -> None:
        try:
            results[key] = function(*args)
        except Exception:
            results[key] = traceback.format_exc()

    torch_backend, deep_backend = scaled_mm.TorchBackend(), deep_gemm.DeepGemmBackend()
    for scales, power_of_two in SCALES.items():
        for name, make in MATRICES.items():
            record(("dense", name, scales), quantized, torch_backend, make(), None, power_of_two)
            if name != "no_rows":
                record(("weight", name, scales), weights, torch_backend, make(), power_of_two)
        for name, counts in COUNTS.items():
            x = random_matrix(sum(counts), 140)
            record(("experts", name, scales), quantized, torch_backend, x, row_tiles(counts), power_of_two)
    for name, sizes in SIZES.items():
        record(("triton", name), products, torch_backend, *sizes, None)
    for name, counts in COUNTS.items():
        record(("triton", "experts", name), products, torch_backend, sum(counts), 130, 200, counts)
    record(("triton", "not_finite"), _not_finite, torch_backend)
    record(("triton", "trial"), lambda: {"errors": scaled_mm.trial_errors(torch_backend, torch.device("cpu"))})
    with (
        mock.patch.object(scaled_mm, "has_scaled_mm", return_value=True),
        mock.patch.object(torch.nn.functional, "scaled_mm", fake_scaled_mm.scaled_mm),
    ):
        for name, sizes in SIZES.items():
            record(("scaled_mm", name), products, torch_backend, *sizes, None)
    with mock.patch.dict(sys.modules, deep_gemm=fake_deep_gemm):
        for name, sizes in SIZES.items():
            record(("deep_gemm", name), products, deep_backend, *sizes, None, torch.bfloat16)
        record(("deep_gemm", "fp32"), products, deep_backend, 5, 130, 200, None)
        record(("deep_gemm", "experts"), products, deep_backend, 135, 130, 200, [130, 0, 5], torch.bfloat16)
    results["calls"] = {"scaled_mm": fake_scaled_mm.calls, "deep_gemm": fake_deep_gemm.calls}
    torch.save(results, folder / "results.pt")


def result_of(results: dict[Any, Any], *key: str) -> Result:
    """A case's result; its traceback fails the test."""
    result = results[key]
    assert isinstance(result, dict), result
    return result


def products(
    backend: Any,
    num_rows: int,
    outputs: int,
    inputs: int,
    counts: list[int] | None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Result:
    """Operands and results of the three products of a linear layer, ``counts`` rows for each expert."""
    tiles: RowTiles | None = None if counts is None else row_tiles(counts, device)
    stack = () if counts is None else (len(counts),)
    x, grad = (random_matrix(num_rows, width, seed=seed).to(device) for seed, width in enumerate((inputs, outputs)))
    weight = random_matrix(*stack, outputs, inputs, seed=2).to(device)
    x_rows, x_columns = backend.quantize_both(x, tiles, power_of_two=False)
    grad_rows, grad_columns = backend.quantize_both(grad, tiles, power_of_two=False)
    forward, backward = backend.quantize_weight(weight, power_of_two=False)
    return {
        "forward": (x_rows, forward, backend.product(x_rows, forward, tiles, dtype)),
        "backward": (grad_rows, backward, backend.product(grad_rows, backward, tiles, dtype)),
        "weight_grad": (grad_columns, x_columns, backend.weight_grad(grad_columns, x_columns, tiles)),
    }


def quantized(backend: Any, x: torch.Tensor, tiles: RowTiles | None, power_of_two: bool) -> Result:
    both = backend.quantize_both(x, tiles, power_of_two=power_of_two)
    rows = backend.quantize_rows(x, power_of_two=power_of_two)
    return {"both": both, "rows": rows, "columns": backend.quantize_columns(x, tiles, power_of_two=power_of_two)}


def weights(backend: Any, x: torch.Tensor, power_of_two: bool) -> Result:
    """One matrix, and a stack of two."""
    both = torch.stack((x.flip(0), x))
    return {
        "one": backend.quantize_weight(x, power_of_two=power_of_two),
        "stack": backend.quantize_weight(both, power_of_two=power_of_two),
    }


def _not_finite(backend: Any) -> Result:
    weight, _ = backend.quantize_weight(random_matrix(130, 200), power_of_two=False)
    rows = {name: backend.quantize_rows(MATRICES[name](), power_of_two=False) for name in ("nan", "inf")}
    return {name: backend.product(each, weight, None, torch.float32) for name, each in rows.items()}


def _mend_interpreter() -> None:
    """Two defects of Triton 3.6's ``runtime/interpreter.py``.

    ``_convert_float`` loses the carry when it rounds a mantissa up to the next power of two (1.97 becomes 1), cuts subnormal
    numbers off, makes 384 of NaN, and rounds to BF16 towards zero: torch's casts round as GPUs do. And numpy 2.4 takes no more
    arrays of one number for an ``int``, as the bounds of loops are.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    torch_types = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
    convert_float, patch_lang_tensor = interpreter._convert_float, interpreter._patch_lang_tensor

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source != tl.float32 or target not in torch_types:
            return convert_float(data, source, target, rounding)
        cast = torch.from_numpy(np.ascontiguousarray(data)).to(torch_types[target])
        return cast.view(torch.uint16 if target == tl.bfloat16 else torch.uint8).numpy()

    def patch(tensor: Any, scope: Any) -> None:
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._convert_float, interpreter._patch_lang_tensor = convert, patch
