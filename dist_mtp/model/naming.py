"""Logical tensors: the Hugging Face checkpoint names behind the parameters that a rank holds.

A fused expert weight is many logical tensors, each a contiguous range of its elements, so every tool that speaks of
parameters (initialisation, dumps, checkpoints) sees the same names whatever the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dist_mtp.model.router import Router


@dataclass(frozen=True)
class LogicalTensor:
    """Elements [start, start + numel) of a flattened parameter, seen as ``shape`` under ``name``."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def view(self, flat: Tensor) -> Tensor:
        """This tensor inside the flattened parameter."""
        return flat[self.start : self.start + self.numel].view(self.shape)


def logical_tensors(name: str, shape: tuple[int, ...], first_expert: int = 0) -> list[LogicalTensor]:
    """The logical tensors of a parameter, in the order of its elements.

    ``...experts.gate_up_proj`` [E, 2 I, D] is, expert by expert, ``experts.{e}.gate_proj.weight`` [I, D] and
    ``experts.{e}.up_proj.weight`` [I, D]; ``...experts.down_proj`` [E, D, I] is ``experts.{e}.down_proj.weight``.

    Args:
        first_expert: number of the first expert in fused weights, which hold those of one rank.
    """
    prefix, _, leaf = name.rpartition(".")
    if not prefix.endswith(".experts"):
        return [LogicalTensor(name, tuple(shape), 0)]
    held, rows, columns = shape
    parts = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else ["down_proj"]
    part_shape = (rows // len(parts), columns)
    return [
        LogicalTensor(
            f"{prefix}.{first_expert + place}.{part}.weight",
            part_shape,
            (place * len(parts) + index) * math.prod(part_shape),
        )
        for place in range(held)
        for index, part in enumerate(parts)
    ]


def routers(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """Every router with the Hugging Face name of its bias, in the order of layers."""
    for name, module in model.named_modules():
        if isinstance(module, Router):
            yield f"{name}.e_score_correction_bias", module


def router_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What routers carry from step to step, by name: the biases, and the previous step's loads."""
    for name, router in routers(model):
        yield name, router.e_score_correction_bias
        yield name.replace("e_score_correction_bias", "load_share"), router.load_share
