"""RMSNorm and embedding: autograd's numbers, and fp32 where bf16 would lose them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mtp.model.embedding import Embedding
from dist_mtp.model.norm import RMSNorm


def tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class TestRMSNorm:
    """A breach: an epsilon outside of the root, a gradient without the statistics' part, a second rounding."""

    def test_gradients_in_float64(self) -> None:
        norm, eps = RMSNorm(9, 1e-2).double(), 1e-2
        norm.weight.data = tensor(9, seed=1)
        x, grad_y = tensor(2, 5, 9, seed=2).requires_grad_(), tensor(2, 5, 9, seed=3)
        y = norm(x)
        y.backward(grad_y)
        expected_x, expected_w = x.detach().requires_grad_(), norm.weight.detach().requires_grad_()
        expected_y = normed(expected_x, expected_w, eps)
        expected_y.backward(grad_y)
        for name, found, expected in (
            ("y", y, expected_y),
            ("x", x.grad, expected_x.grad),
            ("weight", norm.weight.grad, expected_w.grad),
        ):
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13), f"{name}: {found} != {expected}"  # type: ignore[arg-type]

    def test_bf16_is_rounded_once(self) -> None:
        norm = RMSNorm(64, 1e-6).bfloat16()
        norm.weight.data = tensor(64, seed=1, dtype=torch.bfloat16)
        x = tensor(50, 64, seed=2, dtype=torch.bfloat16)
        expected = normed(x.float(), norm.weight.float(), 1e-6).bfloat16()
        differing = int((norm(x) != expected).sum())
        assert differing == 0, f"{differing} of {expected.numel()} values are not the fp32 result, rounded"

    def test_fp32_copy_of_the_weight(self) -> None:
        """1.001 has no place in bf16, whose next number after 1 is 1.0078; both directions use it."""
        norm = RMSNorm(64, 1e-6).bfloat16()
        exact: Any = norm.weight
        exact.fp32_copy = torch.full((64,), 1.2)
        x = tensor(4, 64, seed=2, dtype=torch.bfloat16).requires_grad_()
        y = norm(x)
        assert torch.equal(y, normed(x.float(), torch.tensor(1.2), 1e-6).bfloat16())
        y.backward(torch.ones_like(y))
        wide = x.detach().float().requires_grad_()
        normed(wide, torch.full((64,), 1.2), 1e-6).sum().backward()
        assert x.grad is not None
        assert wide.grad is not None
        assert torch.allclose(x.grad.float(), wide.grad, rtol=2**-7, atol=2**-9), f"{x.grad} != {wide.grad}"


@pytest.mark.parametrize("module", [RMSNorm(4, 1e-6), Embedding(4, 4)], ids=["norm", "embedding"])
def test_frozen_weights_get_no_gradient(module: Any) -> None:
    module.weight.requires_grad_(False)
    module.weight.main_grad = torch.zeros_like(module.weight)
    x = torch.ones(3, 4, requires_grad=True)
    y = module(x) if isinstance(module, RMSNorm) else module(torch.tensor([0, 1])) + x.sum()
    y.sum().backward()
    assert not module.weight.main_grad.any(), module.weight.main_grad


class TestEmbedding:
    """The gradient of a token is the sum over its places, and no place is lost however many there are."""

    @pytest.mark.parametrize("main_grad", [False, True])
    def test_gradient(self, main_grad: bool) -> None:
        embedding = Embedding(7, 5).double()
        weight: Any = embedding.weight
        if main_grad:
            weight.main_grad = torch.ones(7, 5, dtype=torch.float64)
        ids = torch.tensor([[0, 3, 3], [6, 3, 0]])
        for seed in (1, 2):
            y = embedding(ids)
            assert torch.equal(y, embedding.weight[ids])
            y.backward(tensor(2, 3, 5, seed=seed))
        expected = torch.zeros(7, 5, dtype=torch.float64)
        for seed in (1, 2):
            expected += F.one_hot(ids.flatten(), 7).double().t() @ tensor(2, 3, 5, seed=seed).flatten(0, 1)
        found = weight.main_grad - 1 if main_grad else weight.grad
        assert (weight.grad is None) == main_grad
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12), f"{found} != {expected}"

    @pytest.mark.parametrize("main_grad", [False, True])
    def test_a_thousand_places_in_bf16(self, main_grad: bool) -> None:
        """1 added up in bf16 stops at 256, where the next number is 258."""
        embedding = Embedding(2, 4).bfloat16()
        weight: Any = embedding.weight
        if main_grad:
            weight.main_grad = torch.zeros(2, 4)
        embedding(torch.zeros(1000, dtype=torch.int64)).sum().backward()
        found = (weight.main_grad if main_grad else weight.grad)[0].tolist()
        assert found == [1000.0] * 4, f"{found} != 1000"
