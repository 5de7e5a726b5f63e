"""The text of ``dist-mtp bench precision``."""

from __future__ import annotations

import torch

from dist_mtp.bench.precision import FormatResult, LayerResult, PrecisionResult
from dist_mtp.bench.products import PRODUCTS

_HEADINGS = {"forward": "forward", "input_grad": "input grad", "weight_grad": "weight grad"}


def summary(result: PrecisionResult, device: torch.device) -> str:
    """Aligned lines: each shape with its formats, then what is kept for the backward, then what the numbers mean."""
    scale, unit = throughput_unit(device)
    threads = f", threads: {result.threads}" if device.type == "cpu" else ""
    lines = [f"{result.device}{threads}, torch {result.torch}, model={result.model}", "", _header(unit)]
    for layer in result.layers:
        lines.append(_shape_line(layer))
        lines += [_format_line(name, layer, found, scale) for name, found in layer.formats.items()]
    lines += ["", "kept for the backward, bytes per token     bf16      fp8  fp8/bf16"]
    for half, found in result.saved_bytes.items():
        bf16, fp8 = found["bf16"], found["fp8"]
        lines.append(f"  {half:<37} {bf16:8,.0f} {fp8:8,.0f}  {fp8 / bf16:8.2f}")
    lines += ["", *(f"not measured: {name}, {reason}" for name, reason in result.unusable.items())]
    lines.append(
        "throughput: medians of interleaved repetitions; FP8 quantises inputs in the forward and gradients in the input "
        "grad,\nevery shape its own; weights, quantised once per step, are not counted"
    )
    lines.append(
        "error: against the fp64 product of the bf16 operands, norm of the difference over the norm; rounding: the part "
        "of\nthe forward's that rounding both factors to FP8 explains"
    )
    return "\n".join(lines)


def throughput_unit(device: torch.device) -> tuple[float, str]:
    """Factor from FLOP/s, and the name."""
    return (1e-12, "TFLOP/s") if device.type == "cuda" else (1e-9, "GFLOP/s")


def shape_size(layer: LayerResult) -> str:
    """``16 x 384 x 320`` for 16 experts, out and in."""
    shape = layer.shape
    experts = f"{shape.num_experts} x " if shape.num_experts else ""
    return f"{experts}{shape.out_features} x {shape.in_features}"


def _header(unit: str) -> str:
    headings = "".join(f"{heading:>12}" for heading in _HEADINGS.values())
    width = len(headings) + 12
    return (
        f"{'':<14}{unit:>{width}}  |{'relative error':>{width}}\n"
        f"{'':<14}{headings}{'all three':>12}  |{headings}{'rounding':>12}"
    )


def _shape_line(layer: LayerResult) -> str:
    experts = "" if layer.shape.num_experts == layer.experts_of else f" ({layer.experts_of} experts on a rank)"
    return f"{', '.join(layer.shape.names)}: {shape_size(layer)}{experts}, {layer.rows:,} rows"


def _format_line(name: str, layer: LayerResult, found: FormatResult, scale: float) -> str:
    speeds = [layer.flops / found.product_seconds(product) for product in PRODUCTS]
    speeds.append(len(PRODUCTS) * layer.flops / found.total_seconds())
    errors = [f"{found.errors[product]:.1e}" for product in PRODUCTS]
    errors.append("" if found.rounding is None else f"{found.rounding['forward']:.1e}")
    return (
        f"  {name:<12}"
        + "".join(f"{scale * speed:12.1f}" for speed in speeds)
        + "  |"
        + "".join(f"{error:>12}" for error in errors)
    ).rstrip()
