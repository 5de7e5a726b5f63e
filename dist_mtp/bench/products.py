"""The three products of a layer in each format, step by step, and how far they are from the exact ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_mtp.bench.layers import Operands
from dist_mtp.precision.fp8.backend import BACKENDS, Fp8Backend
from dist_mtp.precision.fp8.tiles import Quantized, RowTiles
from dist_mtp.precision.grouped import rows_times_weights, weight_grad

PRODUCTS = ("forward", "input_grad", "weight_grad")
QUANTIZATION = {"forward": "quantize_input", "input_grad": "quantize_grad"}
"""The step that a product in FP8 waits for. The weight gradient uses what both have made."""

Steps = dict[str, Callable[[], object]]
"""Each product by its name, returning its result, and each quantisation."""


def usable_backends(device: torch.device) -> tuple[dict[str, Fp8Backend], dict[str, str]]:
    """FP8 backends that run on a device, and why the others do not, by the name of their format: ``fp8_torch``."""
    problems = {f"fp8_{name}": problem(device) for name, (_, problem) in BACKENDS.items()}
    usable = {f"fp8_{name}": make() for name, (make, _) in BACKENDS.items() if not problems[f"fp8_{name}"]}
    return usable, {name: reason for name, reason in problems.items() if reason}


def plain_steps(operands: Operands, dtype: torch.dtype) -> Steps:
    """Products of torch."""
    operands = operands.to(dtype)
    x, grad, weight, ends = operands.x, operands.grad, operands.weight, operands.ends
    if ends is None:
        return {
            "forward": lambda: x @ weight.t(),
            "input_grad": lambda: grad @ weight,
            "weight_grad": lambda: grad.t() @ x,
        }
    return {
        "forward": lambda: rows_times_weights(x, weight.transpose(-2, -1), ends),
        "input_grad": lambda: rows_times_weights(grad, weight, ends),
        "weight_grad": lambda: weight_grad(grad, x, ends),
    }


class Fp8Products:
    """Products of an FP8 backend. Weights, which change once per optimizer step, are quantised here and in no step."""

    def __init__(self, operands: Operands, backend: Fp8Backend, *, power_of_two: bool) -> None:
        self._operands, self._backend, self._power_of_two = operands, backend, power_of_two
        self._tiles = None if operands.ends is None else RowTiles.of(operands.ends, len(operands.x))
        self._weight = backend.quantize_weight(operands.weight, power_of_two=power_of_two)
        self._x, self._grad = self._quantize(operands.x), self._quantize(operands.grad)

    def _quantize(self, rows: Tensor) -> tuple[Quantized, Quantized]:
        return self._backend.quantize_both(rows, self._tiles, power_of_two=self._power_of_two)

    @property
    def steps(self) -> Steps:
        operands, backend, tiles = self._operands, self._backend, self._tiles
        (x_rows, x_columns), (grad_rows, grad_columns) = self._x, self._grad
        forward, backward = self._weight
        return {
            "quantize_input": lambda: self._quantize(operands.x),
            "forward": lambda: backend.product(x_rows, forward, tiles, operands.x.dtype),
            "quantize_grad": lambda: self._quantize(operands.grad),
            "input_grad": lambda: backend.product(grad_rows, backward, tiles, operands.x.dtype),
            "weight_grad": lambda: backend.weight_grad(grad_columns, x_columns, tiles),
        }

    def rounding_errors(self) -> dict[str, float]:
        """Relative error of each product that rounding both factors explains: errors of their elements are independent."""
        (x_rows, x_columns), (grad_rows, grad_columns) = self._x, self._grad
        x, grad = self._operands.x, self._operands.grad
        padded_x, padded_grad = (x, grad) if self._tiles is None else (self._tiles.pad(x), self._tiles.pad(grad))
        weight = relative_error(self._weight[0].dequantize(), self._operands.weight)
        pairs = {
            "forward": (relative_error(x_rows.dequantize(), x), weight),
            "input_grad": (relative_error(grad_rows.dequantize(), grad), weight),
            "weight_grad": (
                relative_error(grad_columns.dequantize(), padded_grad),
                relative_error(x_columns.dequantize(), padded_x),
            ),
        }
        return {product: (a**2 + b**2) ** 0.5 for product, (a, b) in pairs.items()}


def exact_products(operands: Operands) -> dict[str, Tensor]:
    """Products of the operands in fp64."""
    return results(plain_steps(operands, torch.float64))


def results(steps: Steps) -> dict[str, Tensor]:
    """The three products."""
    found = {}
    for product in PRODUCTS:
        result = steps[product]()
        assert isinstance(result, Tensor)
        found[product] = result
    return found


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of ``exact`` (Frobenius), computed in the wider of both types, at least in fp32."""
    wide = torch.promote_types(torch.promote_types(found.dtype, exact.dtype), torch.float32)
    exact = exact.to(wide)
    return float((found.to(wide) - exact).norm() / exact.norm())
