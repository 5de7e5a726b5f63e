"""The backend ``deep_gemm``, on a stand-in of the library (``tests/support/fake_deep_gemm.py``)."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from support import fake_deep_gemm
from support.fp8_cases import SIZES, assert_products
from support.interpreted_kernels import result_of

from dist_mtp.precision.fp8 import deep_gemm, scaled_mm

CUDA = torch.device("cuda")


class TestDeepGemm:
    """Dense products through the library are those of the quantised numbers, with nothing copied into another layout.

    A breach: an operand that is not K-major, scales that are not TMA-aligned, an output that the kernel cannot write.
    """

    @pytest.mark.parametrize("name", SIZES)
    def test_products(self, interpreted: dict[Any, Any], name: str) -> None:
        assert_products(result_of(interpreted, "deep_gemm", name), None)

    def test_what_it_cannot(self, interpreted: dict[Any, Any]) -> None:
        """Experts', fp32 products and those of no rows are our own kernels'; the weight gradient is in fp32 anyway."""
        assert_products(result_of(interpreted, "deep_gemm", "fp32"), None)
        assert_products(result_of(interpreted, "deep_gemm", "experts"), [130, 0, 5])
        expected = [(1, 128, 128), (1, 128, 128), (1, 1, 128)] * (len(SIZES) - 1) + [(1, 1, 128)]
        found = interpreted["calls"]["deep_gemm"]
        assert found == expected, f"recipes {found}, wanted {expected}"


class TestWhere:
    """``problem`` names what is missing: the GPU, the package, or the functions in it."""

    @pytest.fixture(autouse=True)
    def hopper(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine with an H100, Triton and the library."""
        monkeypatch.setattr(scaled_mm, "problem", lambda device: "")
        monkeypatch.setattr(scaled_mm, "capability", lambda device: (9, 0))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setitem(sys.modules, "deep_gemm", fake_deep_gemm)

    def test_runs(self) -> None:
        assert deep_gemm.problem(CUDA) == ""

    def test_what_torch_lacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scaled_mm, "problem", lambda device: "no CUDA device")
        assert deep_gemm.problem(CUDA) == "no CUDA device"

    def test_other_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Blackwell's kernels would take the exponents of scales alone."""
        monkeypatch.setattr(scaled_mm, "capability", lambda device: (10, 0))
        assert deep_gemm.problem(CUDA) == "compute capability 10.0, needs 9.0"

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert deep_gemm.problem(CUDA) == "package deep_gemm is not installed"

    def test_placeholder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "deep_gemm", types.ModuleType("deep_gemm"))
        expected = "package deep_gemm has no fp8_gemm_nt: install release 2.1 or newer from its repository"
        assert deep_gemm.problem(CUDA) == expected, deep_gemm.problem(CUDA)

    def test_broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(name: str) -> None:
            raise OSError("undefined symbol")

        monkeypatch.setattr(importlib, "import_module", fail)
        assert deep_gemm.problem(CUDA) == "package deep_gemm cannot be imported: undefined symbol"
