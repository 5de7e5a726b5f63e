"""The matrix products of a configuration's layers: shapes, and random operands of a realistic spread."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_mtp.config import Config
from dist_mtp.model.layer import DecoderLayer, MtpModule
from dist_mtp.model.moe import Experts
from dist_mtp.precision.linear import Linear

_OUTLIER_EVERY, _OUTLIER = 128, 32.0
"""Of a layer's inputs: every tile of 128 channels has one that is this much larger."""
_GRAD_SIZE = 1e-4


@dataclass(frozen=True)
class Shape:
    """The weight [out, in] of the layers ``names``, or of one of ``num_experts`` experts; 0 for a dense layer."""

    names: tuple[str, ...]
    out_features: int
    in_features: int
    num_experts: int = 0

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features * max(self.num_experts, 1)


def layer_shapes(config: Config) -> list[Shape]:
    """Distinct shapes of the model's linear layers and of the experts that a rank holds. The output head is left out."""
    model = config.model
    found: dict[tuple[int, ...], dict[str, None]] = defaultdict(dict)  # dictionaries of names for their order
    with torch.device("meta"):
        kinds = {model.is_moe_layer(layer) for layer in range(model.num_layers)}
        blocks: list[nn.Module] = [DecoderLayer(config, is_moe=is_moe) for is_moe in sorted(kinds)]
        if config.mtp.depth:
            blocks.append(MtpModule(config, is_moe=config.mtp_is_moe))
    for block in blocks:
        for path, module in block.named_modules():
            name = path.removeprefix("self_attn.").removeprefix("mlp.")
            if isinstance(module, Linear):
                found[0, *module.weight.shape][name] = None
            elif isinstance(module, Experts):
                for weight in ("gate_up_proj", "down_proj"):
                    found[tuple(getattr(module, weight).shape)][f"{name}.{weight}"] = None
    return [Shape(tuple(names), out, width, experts) for (experts, out, width), names in found.items()]


@dataclass(frozen=True)
class Operands:
    """What the three products of a layer take. bf16.

    ``x``: [N, in]. ``grad``: [N, out], gradient of the output. ``weight``: [out, in], or [E, out, in]. ``ends``: None, or int32
    [E], the end of each expert's rows.
    """

    x: Tensor
    grad: Tensor
    weight: Tensor
    ends: Tensor | None

    @property
    def flops(self) -> float:
        """Of each of the three products."""
        return 2.0 * self.x.numel() * self.grad.shape[1]

    def to(self, dtype: torch.dtype) -> Operands:
        return dataclasses.replace(self, x=self.x.to(dtype), grad=self.grad.to(dtype), weight=self.weight.to(dtype))


def random_operands(shape: Shape, rows: int, *, seed: int, device: torch.device) -> Operands:
    """Operands whose tiles are as uneven as those of training.

    Inputs: normal, channels log-normal, some of them outliers. Gradients: normal, tokens log-normal. Weights: normal. Rows
    choose an expert each, independently and uniformly. From the seed, on one kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    x = normal(rows, shape.in_features) * normal(shape.in_features).exp()
    x[:, ::_OUTLIER_EVERY] *= _OUTLIER
    grad = normal(rows, shape.out_features) * normal(rows, 1).exp() * _GRAD_SIZE
    stack = (shape.num_experts,) if shape.num_experts else ()
    weight = normal(*stack, shape.out_features, shape.in_features) * shape.in_features**-0.5
    ends = None
    if shape.num_experts:
        chosen = torch.randint(shape.num_experts, (rows,), generator=generator, device=device)
        ends = chosen.bincount(minlength=shape.num_experts).cumsum(0).to(torch.int32)
    return Operands(x.bfloat16(), grad.bfloat16(), weight.bfloat16(), ends)
