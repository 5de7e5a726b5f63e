"""Withheld weight gradients: the same numbers, later, without holding on to graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_mtp.precision.grouped import grouped_linear
from dist_mtp.precision.linear import Linear
from dist_mtp.precision.weight_grads import DeferrableLayer, WeightGradQueue, attach_queue, run


class Grouped(DeferrableLayer):
    """Three experts, the middle one without rows."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        ends = torch.tensor([4, 4, rows.shape[0]], dtype=torch.int32)
        return grouped_linear(rows, self.weight, ends, self).view(*x.shape[:-1], -1)


def network(kind: type[Linear | Grouped], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, WeightGradQueue]:
    """Two layers with something between them."""
    layers = nn.Sequential(kind(8, 16), nn.SiLU(), kind(16, 8)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    queue = WeightGradQueue()
    attach_queue(layers, queue)
    return layers, queue


def microbatch(seed: int) -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))


def backward(model: Callable[[Tensor], Tensor], queue: WeightGradQueue, x: Tensor, *, defer: bool) -> Tensor:
    """The input's gradient."""
    x = x.clone().requires_grad_()
    y = model(x)
    queue.deferring = defer
    y.pow(2).sum().backward()
    queue.deferring = False
    assert x.grad is not None
    return x.grad


def weight_grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


KINDS = pytest.mark.parametrize("kind", [Linear, Grouped])


@KINDS
class TestSameGradients:
    """Deferring changes when a weight gradient is computed, not its value.

    A breach: a gradient that autograd and the closure both add, or that neither adds.
    """

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_one_microbatch_bitwise(self, kind: type[Linear | Grouped], dtype: torch.dtype) -> None:
        model, queue = network(kind, dtype)
        x = microbatch(1).to(dtype)
        expected_x = backward(model, queue, x, defer=False)
        expected = weight_grads(model)
        model.zero_grad()
        found_x = backward(model, queue, x, defer=True)
        assert torch.equal(found_x, expected_x), f"input gradient: {found_x} != {expected_x}"
        assert not weight_grads(model), f"before its turn there is {weight_grads(model)}"
        run(queue.take())
        found = weight_grads(model)
        assert found.keys() == expected.keys() == {"0.weight", "2.weight"}
        for name, grad in found.items():
            assert torch.equal(grad, expected[name]), f"{name}: {grad} != {expected[name]}"

    def test_plain_formula(self, kind: type[Linear | Grouped]) -> None:
        """Both ways equal what autograd makes of plain matrix products, in float64."""
        model, queue = network(kind, torch.float64)
        x = microbatch(1).double()
        plain_x = x.clone().requires_grad_()
        weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
        hidden: Tensor = plain_x.flatten(0, 1)
        experts = torch.tensor([0] * 4 + [2] * 6)
        for index, weight in enumerate(weights):
            per_row = weight.expand(10, -1, -1) if weight.dim() == 2 else weight[experts]
            hidden = torch.einsum("ni,noi->no", hidden, per_row)
            hidden = nn.functional.silu(hidden) if index == 0 else hidden
        hidden.pow(2).sum().backward()
        grad_x = backward(model, queue, x, defer=True)
        run(queue.take())
        pairs = [(grad_x, plain_x.grad), *((p.grad, w.grad) for p, w in zip(model.parameters(), weights, strict=True))]
        for found, expected in pairs:
            assert found is not None
            assert expected is not None
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12), f"{found} != {expected}"

    def test_many_microbatches_in_any_order(self, kind: type[Linear | Grouped]) -> None:
        """Closures of a microbatch are its own: they may run after later backwards and mixed with undeferred ones."""
        model, queue = network(kind)
        for seed in (1, 2, 3):
            backward(model, queue, microbatch(seed), defer=False)
        expected = weight_grads(model)
        model.zero_grad()
        backward(model, queue, microbatch(1), defer=True)
        first = queue.take()
        backward(model, queue, microbatch(2), defer=True)
        second = queue.take()
        assert len(first) == len(second) == 2, f"{len(first)} and {len(second)} closures of two layers each"
        backward(model, queue, microbatch(3), defer=False)
        run(second)
        run(first)
        for name, grad in weight_grads(model).items():
            assert torch.allclose(grad, expected[name], rtol=1e-5, atol=1e-5), f"{name}: {grad} != {expected[name]}"

    def test_main_grad(self, kind: type[Linear | Grouped]) -> None:
        """bf16 weights with an fp32 ``main_grad`` sum there, where small terms survive; ``.grad`` stays empty."""
        model, queue = network(kind, torch.bfloat16)
        backward(model, queue, microbatch(1).bfloat16(), defer=False)
        expected = weight_grads(model)
        model.zero_grad()
        for parameter in model.parameters():
            parameter.main_grad = torch.full(parameter.shape, 100.0)
        backward(model, queue, microbatch(1).bfloat16(), defer=False)
        backward(model, queue, microbatch(1).bfloat16(), defer=True)
        run(queue.take())
        for name, parameter in model.named_parameters():
            assert parameter.grad is None, f"{name}: .grad is {parameter.grad}"
            wanted = 100 + expected[name].float() + expected[name].float()
            assert torch.equal(parameter.main_grad, wanted), f"{name}: {parameter.main_grad} != {wanted}"

    def test_first_layer_without_input_gradient(self, kind: type[Linear | Grouped]) -> None:
        """An input that needs no gradient, as after frozen weights, still gives weight gradients."""
        model, queue = network(kind)
        backward(model, queue, microbatch(1), defer=False)
        expected = weight_grads(model)
        model.zero_grad()
        y = model(microbatch(1))
        queue.deferring = True
        y.pow(2).sum().backward()
        run(queue.take())
        for name, grad in weight_grads(model).items():
            assert torch.equal(grad, expected[name]), f"{name}: {grad} != {expected[name]}"


@KINDS
class TestMemory:
    """What is withheld is activations and output gradients, never a graph.

    A breach: memory that grows from microbatch to microbatch, because ``weight.grad`` remembers where it came from.
    """

    def test_gradient_has_no_history(self, kind: type[Linear | Grouped]) -> None:
        model, queue = network(kind)
        for seed in (1, 2):
            backward(model, queue, microbatch(seed), defer=True)
            run(queue.take())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.grad_fn is None, f"{name}: grad_fn is {parameter.grad.grad_fn}"
            assert not parameter.grad.requires_grad, f"{name}: the gradient requires a gradient"

    def test_nothing_outlives_its_closures(self, kind: type[Linear | Grouped]) -> None:
        """Every tensor of a microbatch is gone once its closures ran; the number of tensors stays flat."""
        model, queue = network(kind)
        alive: list[int] = []
        outputs: list[weakref.ref[Tensor]] = []
        model[0].register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out)))
        for seed in range(6):
            backward(model, queue, microbatch(seed), defer=True)
            closures = queue.take()
            run(closures)
            assert closures == [], f"{len(closures)} closures are kept"
            alive.append(sum(issubclass(type(each), Tensor) for each in gc.get_objects()))
        left = [ref() for ref in outputs if ref() is not None]
        assert not left, f"{len(left)} activations are alive"
        assert len(set(alive[1:])) == 1, f"tensors alive after each microbatch: {alive}"

    def test_activations_go_one_by_one(self, kind: type[Linear | Grouped]) -> None:
        """A closure's activations are freed before the next closure runs."""
        model, queue = network(kind)
        backward(model, queue, microbatch(1), defer=True)
        closures = queue.take()
        first = weakref.ref(closures[0])
        seen: list[bool] = []
        closures.insert(1, lambda: seen.append(first() is None))
        run(closures)
        assert seen == [True], "the first closure is alive while the second runs"


class TestCheckpointing:
    """Under non-reentrant activation checkpointing the gradient reaches the parameter itself.

    A breach: it lands on the copy that unpacking a saved tensor makes, and the parameter trains on nothing.
    """

    @KINDS
    @pytest.mark.parametrize("defer", [False, True])
    def test_gradients(self, kind: type[Linear | Grouped], defer: bool) -> None:
        model, queue = network(kind)
        expected_x = backward(model, queue, microbatch(1), defer=False)
        expected = weight_grads(model)
        model.zero_grad()
        found_x = backward(lambda x: checkpoint(model, x, use_reentrant=False), queue, microbatch(1), defer=defer)
        run(queue.take())
        assert torch.equal(found_x, expected_x), f"input gradient: {found_x} != {expected_x}"
        found = weight_grads(model)
        assert found.keys() == expected.keys(), f"gradients of {sorted(found)}, wanted {sorted(expected)}"
        for name, grad in found.items():
            assert torch.equal(grad, expected[name]), f"{name}: {grad} != {expected[name]}"


class TestQueues:
    """A queue belongs to one stage; taking empties it."""

    def test_stages_do_not_mix(self) -> None:
        model, first = network(Linear)
        second = WeightGradQueue()
        attach_queue(model[2], second)
        first.deferring = True
        model(microbatch(1)).sum().backward()
        assert len(first.take()) == 1, "the first stage defers its own layer"
        assert len(second.take()) == 0, "the second does not defer"
        assert model[0].weight.grad is None
        assert model[2].weight.grad is not None

    def test_take_empties(self) -> None:
        model, queue = network(Linear)
        backward(model, queue, microbatch(1), defer=True)
        assert len(queue.take()) == 2
        assert queue.take() == []

    def test_without_a_queue(self) -> None:
        """Layers outside a pipeline are ordinary layers."""
        layer = Linear(4, 3)
        nn.init.ones_(layer.weight)
        layer(torch.ones(2, 4)).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.tolist() == [[2.0] * 4] * 3, f"{layer.weight.grad} != 2"
