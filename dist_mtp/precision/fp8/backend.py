"""What multiplies in FP8: the interface that every device's kernels stand behind, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dist_mtp.errors import ConfigError
from dist_mtp.precision.fp8.tiles import Quantized, RowTiles


class Fp8Backend(Protocol):
    """Quantises as :func:`dist_mtp.precision.fp8.tiles.quantize` does, and multiplies what it has quantised.

    Products sum in fp32, and add each 128 values' sum, times its two scales, in fp32. Rows are [N, C]; ``tiles`` is None for
    a dense layer and says for experts whose rows are whose; then weights are stacks [E, ..].
    """

    name: str

    def quantize_rows(self, x: Tensor, *, power_of_two: bool) -> Quantized:
        """Tiles of 128 columns, for a product that sums over columns."""
        ...

    def quantize_columns(self, x: Tensor, tiles: RowTiles | None, *, power_of_two: bool) -> Quantized:
        """Tiles of 128 rows, for a product that sums over rows. With ``tiles`` rows are padded as :meth:`RowTiles.pad` does."""
        ...

    def quantize_both(self, x: Tensor, tiles: RowTiles | None, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
        """:meth:`quantize_rows` and :meth:`quantize_columns` of the same rows, read once."""
        ...

    def quantize_weight(self, weight: Tensor, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
        """Blocks of 128 x 128 of [.., out, in], as the forward's product and (transposed) the backward's take them."""
        ...

    def product(self, rows: Quantized, weight: Quantized, tiles: RowTiles | None, dtype: torch.dtype) -> Tensor:
        """``rows @ weight^T`` in ``dtype``: [N, C] with row tiles times [.., M, C] in blocks -> [N, M]."""
        ...

    def weight_grad(self, grad: Quantized, x: Quantized, tiles: RowTiles | None) -> Tensor:
        """``grad^T @ x`` in fp32: [N, out] and [N, in], both with column tiles -> [.., out, in]."""
        ...


def _emulated() -> Fp8Backend:
    from dist_mtp.precision.fp8.emulated import EmulatedBackend

    return EmulatedBackend()


def _torch() -> Fp8Backend:
    from dist_mtp.precision.fp8.scaled_mm import TorchBackend

    return TorchBackend()


def _torch_problem(device: torch.device) -> str:
    from dist_mtp.precision.fp8.scaled_mm import problem

    return problem(device)


def _deep_gemm() -> Fp8Backend:
    from dist_mtp.precision.fp8.deep_gemm import DeepGemmBackend

    return DeepGemmBackend()


def _deep_gemm_problem(device: torch.device) -> str:
    from dist_mtp.precision.fp8.deep_gemm import problem

    return problem(device)


BACKENDS: dict[str, tuple[Callable[[], Fp8Backend], Callable[[torch.device], str]]] = {
    "emulated": (_emulated, lambda device: ""),
    "torch": (_torch, _torch_problem),
    "deep_gemm": (_deep_gemm, _deep_gemm_problem),
}
"""How to make each backend, and why it cannot run on a device (empty where it can)."""


def make_backend(name: str, device: torch.device) -> Fp8Backend:
    """The backend that ``precision.fp8_backend`` names; ``auto`` takes ``torch`` where it runs, else ``emulated``.

    Raises:
        ConfigError: it cannot run on this device.
    """
    if name == "auto":
        name = "emulated" if _torch_problem(device) else "torch"
    make, problem = BACKENDS[name]
    if reason := problem(device):
        raise ConfigError(f"precision.fp8_backend={name} cannot run here: {reason}; use auto or emulated")
    return make()
