"""What a layer that multiplies in FP8 owns: the backend, its quantised weights, and where its statistics go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from dist_mtp.linear_names import OUTPUT_HEAD
from dist_mtp.precision.fp8.backend import Fp8Backend
from dist_mtp.precision.fp8.statistics import Fp8Statistics
from dist_mtp.precision.fp8.tiles import Quantized, RowTiles
from dist_mtp.precision.weight_grads import DeferrableLayer


@dataclass(frozen=True)
class Operand:
    """A layer's input, or the gradient of its output. ``columns`` is for the weight gradient; None where there is none."""

    rows: Quantized
    columns: Quantized | None


@dataclass(frozen=True)
class Fp8Weight:
    """A weight as the forward's product and, transposed, as the backward's takes it."""

    forward: Quantized
    backward: Quantized


class Fp8Layer:
    """The FP8 side of one layer.

    Weights are quantised at their first use after a change, so once per optimizer step.

    Args:
        kind: one of :data:`~dist_mtp.precision.fp8.statistics.KINDS`.
    """

    def __init__(self, backend: Fp8Backend, statistics: Fp8Statistics, *, kind: str, power_of_two: bool) -> None:
        self.backend, self.statistics, self.kind, self.power_of_two = backend, statistics, kind, power_of_two
        self._weights: dict[Tensor, tuple[int, Fp8Weight]] = {}

    def quantize_input(self, x: Tensor, tiles: RowTiles | None = None) -> Operand:
        """x: [.., in]. With column tiles while gradients are recorded, so call it outside of autograd functions."""
        recording = torch.is_grad_enabled()
        with torch.no_grad():
            return self._quantize("input", x.reshape(-1, x.shape[-1]), tiles, columns=recording)

    def quantize_grad(self, grad: Tensor, tiles: RowTiles | None) -> Operand:
        """grad: [.., out]."""
        return self._quantize("grad", grad.reshape(-1, grad.shape[-1]), tiles, columns=True)

    def quantize_rows(self, x: Tensor) -> Quantized:
        """Row tiles of [N, C] that no statistic counts."""
        return self.backend.quantize_rows(x, power_of_two=self.power_of_two)

    def quantize_columns(self, x: Tensor, tiles: RowTiles | None) -> Quantized:
        """Column tiles of [N, C] that no statistic counts."""
        return self.backend.quantize_columns(x, tiles, power_of_two=self.power_of_two)

    def weight(self, weight: Tensor) -> Fp8Weight:
        """weight: [.., out, in], a parameter of this layer."""
        version, quantized = self._weights.get(weight, (None, None))
        if quantized is None or version != weight._version:
            pair = self.backend.quantize_weight(weight.detach(), power_of_two=self.power_of_two)
            self.statistics.observe(self.kind, "weight", weight.detach(), pair[0])
            quantized = Fp8Weight(*pair)
            self._weights[weight] = weight._version, quantized
        return quantized

    def forget_weights(self) -> None:
        """Weights have changed through other tensors that share their memory, which torch does not count as a change."""
        self._weights.clear()

    def _quantize(self, role: str, x: Tensor, tiles: RowTiles | None, *, columns: bool) -> Operand:
        if columns:
            operand = Operand(*self.backend.quantize_both(x, tiles, power_of_two=self.power_of_two))
        else:
            operand = Operand(self.quantize_rows(x), None)
        self.statistics.observe(self.kind, role, x, operand.rows)
        return operand


class Fp8Model:
    """All FP8 layers of a rank's model."""

    def __init__(self, layers: dict[str, Fp8Layer], backend: Fp8Backend, statistics: Fp8Statistics) -> None:
        self.layers, self.backend, self.statistics = layers, backend, statistics

    def forget_weights(self) -> None:
        """See :meth:`Fp8Layer.forget_weights`; so do DeepSpeed's steps."""
        for layer in self.layers.values():
            layer.forget_weights()

    def measure(self) -> None:
        """Count in :attr:`statistics` what is quantised from now until they are taken."""
        self.forget_weights()  # an evaluation may have quantised them
        self.statistics.active = True


def attach_fp8(
    model: nn.Module,
    backend: Fp8Backend,
    *,
    keep_bf16: Sequence[str] = (),
    power_of_two: bool = False,
    fp8_dispatch: bool = False,
) -> Fp8Model:
    """Make the linear layers and experts below ``model`` multiply in FP8.

    Args:
        keep_bf16: shell-style patterns (``model.layers.0.*``) of layer names that do not.
        power_of_two: all scales are powers of two.
        fp8_dispatch: those of experts are, whose rows have come with such scales: others would round them once more.
    """
    statistics = Fp8Statistics()
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, DeferrableLayer) and not is_kept(name, keep_bf16):
            kind = kind_of(name)
            exact = power_of_two or (fp8_dispatch and kind == "experts")
            layers[name] = layer.fp8 = Fp8Layer(backend, statistics, kind=kind, power_of_two=exact)
    return Fp8Model(layers, backend, statistics)


def is_kept(name: str, keep_bf16: Sequence[str]) -> bool:
    """Whether the layer called ``name`` stays in BF16, as the output head always does."""
    return any(fnmatchcase(name, pattern) for pattern in (OUTPUT_HEAD, *keep_bf16))


def kind_of(name: str) -> str:
    """Kind of the layer called ``name``, for statistics.

    >>> kind_of("model.layers.3.mlp.shared_experts.up_proj")
    'shared_experts'
    """
    for kind, part in (("attention", "self_attn"), ("shared_experts", "shared_experts"), ("experts", "experts")):
        if part in name.split("."):
            return kind
    return "mtp_projection" if name.endswith("eh_proj") else "feed_forward"
