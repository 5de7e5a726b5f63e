"""The backend ``torch``: the calls it makes of ``F.scaled_mm``, on a stand-in, and where it says that it runs."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from support.fp8_cases import SIZES, assert_products
from support.interpreted_kernels import result_of

from dist_mtp.precision.fp8 import scaled_mm

CUDA = torch.device("cuda")


class TestScaledMM:
    """Dense products through ``F.scaled_mm`` are those of the quantised numbers, whatever their sizes.

    The stand-in (``tests/support/fake_scaled_mm.py``) refuses layouts that torch refuses, and reads scales as cuBLASLt does.
    A breach: scales in another order or without their padding, which cuBLASLt multiplies without complaint.
    """

    @pytest.mark.parametrize("name", SIZES)
    def test_products(self, interpreted: dict[Any, Any], name: str) -> None:
        assert_products(result_of(interpreted, "scaled_mm", name), None)

    def test_every_product_takes_it(self, interpreted: dict[Any, Any]) -> None:
        """But those of no rows."""
        expected = ["BlockWise128x128", "BlockWise128x128", "BlockWise1x128"] * (len(SIZES) - 1)
        found = interpreted["calls"]["scaled_mm"]
        assert found == expected, f"second matrices {found}, wanted {expected}"


class TestWhere:
    """``problem`` names what is missing, with numbers; ``has_scaled_mm`` is true on Hopper with CUDA 12.9 alone."""

    @pytest.fixture(autouse=True)
    def hopper(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine with an H100, CUDA 12.9 and Triton."""
        monkeypatch.setattr(torch.version, "cuda", "12.9")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(scaled_mm, "capability", lambda device: (9, 0))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(scaled_mm, "trial_errors", lambda backend, device: {"dense product": 1e-3})
        scaled_mm._trial.cache_clear()

    def test_trial_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A GPU for which something is missing or wrong is found out before training, and said."""

        def failing(backend: object, device: torch.device) -> dict[str, float]:
            raise RuntimeError("no C compiler")

        for errors, said in (
            (failing, "a trial product failed: RuntimeError: no C compiler"),
            (lambda backend, device: {"dense product": 0.3}, "trial products are wrong, relative errors"),
            (lambda backend, device: {"dense product": float("nan")}, "trial products are wrong, relative errors"),
        ):
            scaled_mm._trial.cache_clear()
            monkeypatch.setattr(scaled_mm, "trial_errors", errors)
            assert scaled_mm.problem(CUDA).startswith(said), scaled_mm.problem(CUDA)
        scaled_mm._trial.cache_clear()

    def test_runs(self) -> None:
        assert scaled_mm.problem(CUDA) == ""
        assert scaled_mm.has_scaled_mm(CUDA)

    def test_no_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert scaled_mm.problem(torch.device("cpu")) == "no CUDA device"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert scaled_mm.problem(CUDA) == "no CUDA device"

    def test_no_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """AMD's GPUs call themselves ``cuda``, too."""
        monkeypatch.setattr(torch.version, "cuda", None)
        assert scaled_mm.problem(CUDA) == "no CUDA device"
        assert not scaled_mm.has_scaled_mm(CUDA)

    def test_old_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scaled_mm, "capability", lambda device: (8, 0))
        assert scaled_mm.problem(CUDA) == "compute capability 8.0, needs 9.0 or newer"

    def test_no_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert scaled_mm.problem(CUDA) == "package triton is not installed"

    @pytest.mark.parametrize("capability", [(10, 0), (12, 0)])
    def test_other_gpus_multiply_with_triton(
        self, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scaled_mm, "capability", lambda device: capability)
        assert scaled_mm.problem(CUDA) == ""
        assert not scaled_mm.has_scaled_mm(CUDA)

    @pytest.mark.parametrize(("version", "has"), [("12.8", False), ("12.9", True), ("13.0", True)])
    def test_cuda_versions(self, version: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", version)
        assert scaled_mm.has_scaled_mm(CUDA) == has, f"CUDA {version}: {scaled_mm.has_scaled_mm(CUDA)}"
