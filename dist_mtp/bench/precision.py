"""Error and throughput of the model's matrix products in every format that a device has, and what each keeps.

A pure measurement: nothing is printed or written.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from dist_mtp.bench.layers import Operands, Shape, layer_shapes, random_operands
from dist_mtp.bench.products import (
    PRODUCTS,
    QUANTIZATION,
    Fp8Products,
    Steps,
    exact_products,
    plain_steps,
    relative_error,
    results,
    usable_backends,
)
from dist_mtp.bench.saved import half_saved_bytes, halves_of, with_local_experts
from dist_mtp.bench.timing import device_name, interleaved_medians
from dist_mtp.config import Config
from dist_mtp.precision.fp8.backend import Fp8Backend

SEED = 1
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Limits:
    """What keeps a measurement short."""

    rows: int
    flops: float
    """Of one product; rows are lowered until they fit, to 128 at least."""
    expert_weights: float
    """Of one layer; fewer experts are measured where they have more."""
    budget_s: float
    """For timing all shapes."""


_LIMITS = {"cpu": Limits(4096, 1e10, 2e8, 10.0), "cuda": Limits(2**17, 1e13, 5e8, 60.0)}


@dataclass(frozen=True)
class FormatResult:
    """One format on one shape. ``seconds``: of each step. ``errors``: relative, of each product, against fp64.

    ``rounding``: what quantisation alone explains of ``errors``; None for formats of torch.
    """

    seconds: dict[str, float]
    errors: dict[str, float]
    rounding: dict[str, float] | None

    def product_seconds(self, product: str, *, quantization: bool = True) -> float:
        """Time of a product, with the quantisation that it waits for."""
        extra = self.seconds.get(QUANTIZATION.get(product, ""), 0.0) if quantization else 0.0
        return self.seconds[product] + extra

    def total_seconds(self, *, quantization: bool = True) -> float:
        """Time of all three."""
        return sum(self.product_seconds(product, quantization=quantization) for product in PRODUCTS)


@dataclass(frozen=True)
class LayerResult:
    """``flops``: of each product. ``experts_of``: experts that a rank holds, of which ``shape`` may have fewer."""

    shape: Shape
    experts_of: int
    rows: int
    flops: float
    formats: dict[str, FormatResult]


@dataclass(frozen=True)
class PrecisionResult:
    """``threads``: of a CPU. ``unusable``: FP8 backends that cannot run, and why. ``saved_bytes``: of a token, by half of a layer and format."""

    device: str
    threads: int
    torch: str
    model: str
    seed: int
    layers: tuple[LayerResult, ...]
    unusable: dict[str, str]
    saved_bytes: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """The content of ``precision.json``; steps in seconds, throughput in FLOP/s with quantisation of activations."""
        content = dataclasses.asdict(self)
        for layer, found in zip(content["layers"], self.layers, strict=True):
            for name, result in found.formats.items():
                layer["formats"][name]["flops_per_s"] = {
                    **{product: found.flops / result.product_seconds(product) for product in PRODUCTS},
                    "all": len(PRODUCTS) * found.flops / result.total_seconds(),
                }
        return content


def measure(config: Config, device: torch.device) -> PrecisionResult:
    """Measure on an otherwise idle device.

    Args:
        config: resolved. Rows are those of one microbatch, experts those of one rank.
    """
    limits = _LIMITS[device.type]
    backends, unusable = usable_backends(device)
    shapes = layer_shapes(config)
    rows = config.train.micro_batch_size * config.train.seq_len
    return PrecisionResult(
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        model=config.model.name,
        seed=SEED,
        layers=tuple(
            _measure_layer(config, shape, rows, backends, device, limits, limits.budget_s / len(shapes))
            for shape in shapes
        ),
        unusable=unusable,
        saved_bytes=_measure_saved(config, backends, device, limits),
    )


def measure_formats(
    operands: Operands,
    plain: dict[str, torch.dtype],
    backends: dict[str, Fp8Backend],
    *,
    power_of_two: bool,
    budget_s: float,
) -> dict[str, FormatResult]:
    """Every format on the same operands, timed in turns."""
    quantized = {name: Fp8Products(operands, backend, power_of_two=power_of_two) for name, backend in backends.items()}
    steps: dict[str, Steps] = {name: plain_steps(operands, dtype) for name, dtype in plain.items()}
    steps |= {name: products.steps for name, products in quantized.items()}
    exact = exact_products(operands)
    errors = {
        name: {product: relative_error(found, exact[product]) for product, found in results(of_format).items()}
        for name, of_format in steps.items()
    }
    del exact
    cases = {(name, step): function for name, of_format in steps.items() for step, function in of_format.items()}
    seconds = interleaved_medians(cases, operands.x.device, budget_s=budget_s)
    return {
        name: FormatResult(
            seconds={step: seconds[name, step] for step in of_format},
            errors=errors[name],
            rounding=quantized[name].rounding_errors() if name in quantized else None,
        )
        for name, of_format in steps.items()
    }


def _measure_layer(
    config: Config,
    shape: Shape,
    tokens: int,
    backends: dict[str, Fp8Backend],
    device: torch.device,
    limits: Limits,
    budget_s: float,
) -> LayerResult:
    wanted = tokens * config.model.num_experts_per_tok if shape.num_experts else tokens
    fitting = int(limits.flops / (2 * shape.out_features * shape.in_features)) // 128 * 128
    rows = min(wanted, limits.rows, max(fitting, 128))
    measured = shape
    if shape.num_experts:
        of_one = shape.num_weights // shape.num_experts
        measured = dataclasses.replace(
            shape, num_experts=min(shape.num_experts, max(int(limits.expert_weights // of_one), 1))
        )
    operands = random_operands(measured, rows, seed=SEED, device=device)
    formats = measure_formats(
        operands, PLAIN, backends, power_of_two=config.precision.fp8_power_of_two_scales, budget_s=budget_s
    )
    return LayerResult(measured, shape.num_experts, rows, operands.flops, formats)


def _measure_saved(
    config: Config, backends: dict[str, Fp8Backend], device: torch.device, limits: Limits
) -> dict[str, dict[str, float]]:
    """All FP8 backends keep the same tiles; the last one that runs on the device is taken."""
    config = with_local_experts(config, limits.expert_weights)
    rows = max(min(config.train.micro_batch_size, limits.rows // config.train.seq_len), 1)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=rows))
    fp8 = list(backends.values())[-1]
    return {
        half: {
            "bf16": half_saved_bytes(config, half, device),
            "fp8": half_saved_bytes(config, half, device, fp8=fp8),
        }
        for half in halves_of(config)
    }
