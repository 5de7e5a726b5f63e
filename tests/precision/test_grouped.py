"""The grouped linear of experts: torch's kernel and the loop over experts are the same function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mtp.precision import grouped
from dist_mtp.precision.grouped import grouped_linear
from dist_mtp.precision.weight_grads import DeferrableLayer

COUNTS = {
    "even": [4, 4, 4],
    "empty_experts": [0, 5, 0, 0, 3, 0],
    "one_expert": [0, 0, 7],
    "one_row": [0, 1, 0],
    "no_rows": [0, 0, 0],
}


def run_grouped(counts: list[int], widths: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Output, input gradient, weight gradient; then the same row by row in float64."""
    generator = torch.Generator().manual_seed(1)
    inner, outer = widths
    x = torch.randn(sum(counts), inner, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), outer, inner, generator=generator, dtype=torch.float64).to(dtype)
    weight.requires_grad_()
    grad_y = torch.randn(sum(counts), outer, generator=generator, dtype=torch.float64).to(dtype)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    y = grouped_linear(x, weight, ends, DeferrableLayer())
    y.backward(grad_y)
    x_wide, w_wide, g_wide = (t.detach().double() for t in (x, weight, grad_y))
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    expected_y = torch.einsum("ni,noi->no", x_wide, w_wide[experts])
    expected_x = torch.einsum("no,noi->ni", g_wide, w_wide[experts])
    expected_w = torch.zeros_like(w_wide).index_add_(0, experts, torch.einsum("no,ni->noi", g_wide, x_wide))
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad, expected_y, expected_x, expected_w


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[None]:
    """A list that grows by one with every call of ``module.name`` from now on."""
    calls: list[None] = []
    original = getattr(module, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counting)
    return calls


class TestGroupedLinear:
    """Output, input gradient and weight gradient are those of each row times its expert's weight.

    A breach: rows of a neighbouring expert, or uninitialised memory in the gradient of an expert without rows.
    """

    @pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
    @pytest.mark.parametrize("widths", [(8, 16), (5, 7), (8, 6), (6, 8)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_equals_naive(self, counts: list[int], widths: tuple[int, int], dtype: torch.dtype) -> None:
        *ours, y, x, w = run_grouped(counts, widths, dtype)
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-1}[dtype]
        for name, found, expected in zip(("y", "grad_x", "grad_weight"), ours, (y, x, w), strict=True):
            assert found.shape == expected.shape, f"{name}: {found.shape} != {expected.shape}"
            assert found.dtype == dtype, f"{name}: {found.dtype} != {dtype}"
            if found.numel() == 0:
                continue
            difference = float((found.double() - expected).abs().max())
            assert difference <= tolerance, f"{name}: {found} != {expected} (differ by {difference})"

    @pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
    def test_kernel_equals_loop(self, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        by_kernel = run_grouped(counts, (8, 16), torch.float32)[:3]
        monkeypatch.setattr(grouped, "_has_kernel", lambda a, b: False)
        by_loop = run_grouped(counts, (8, 16), torch.float32)[:3]
        for name, a, b in zip(("y", "grad_x", "grad_weight"), by_kernel, by_loop, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5), f"{name}: kernel {a} != loop {b}"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
    def test_three_kernel_calls_and_no_loop(
        self, counts: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Training never loops over experts; without rows it needs not even the kernel."""
        calls = count_calls(monkeypatch, F, "grouped_mm")
        loops = count_calls(monkeypatch, grouped, "_ranges")
        run_grouped(counts, (8, 16), dtype)
        expected = 3 if sum(counts) else 0
        assert (len(calls), len(loops)) == (expected, 0), f"{len(calls)} kernel calls and {len(loops)} loops"

    def test_no_rows_in_the_dtype_of_the_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loops = count_calls(monkeypatch, grouped, "_ranges")
        run_grouped([0, 0], (8, 16), torch.float64)
        assert not loops, f"{len(loops)} loops over no rows"

    def test_gradients_that_the_kernel_leaves_unwritten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A kernel that skips experts without rows in the weight gradient, as on Blackwell: they get zeros all the same."""
        counts, kernel = [0, 5, 0, 3], F.grouped_mm

        def skipping(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
            out = kernel(a, b, offs=offs)
            if b.dim() == 2:
                out[torch.tensor(counts) == 0] = float("nan")
            return out

        monkeypatch.setattr(F, "grouped_mm", skipping)
        monkeypatch.setattr(grouped, "_kernel_skips_empty_sums", lambda device: True)
        *_, found, _, _, expected = run_grouped(counts, (8, 16), torch.float32)
        assert torch.allclose(found.double(), expected, rtol=0, atol=1e-5), f"{found} != {expected}"

    def test_expanded_output_gradient(self) -> None:
        """``sum().backward()`` hands down a gradient without memory of its own, which the kernel refuses."""
        x = torch.ones(6, 8, requires_grad=True)
        weight = torch.ones(2, 4, 8, requires_grad=True)
        grouped_linear(x, weight, torch.tensor([2, 6], dtype=torch.int32), DeferrableLayer()).sum().backward()
        assert weight.grad is not None
        found = weight.grad[:, 0, 0].tolist()
        assert found == [2.0, 4.0], f"{found} != [2.0, 4.0]"
