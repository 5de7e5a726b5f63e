"""FP8 layers: outputs and gradients are those of the recipe, whatever runs the backward when."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from precision import fp8_reference
from precision.fp8_reference import rounded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_mtp.model.feed_forward import FeedForward
from dist_mtp.precision.fp8.emulated import EmulatedBackend
from dist_mtp.precision.fp8.layer import attach_fp8
from dist_mtp.precision.fp8.linear import fp8_linear, fp8_swiglu_linear
from dist_mtp.precision.fp8.tiles import RowTiles
from dist_mtp.precision.linear import Linear, project
from dist_mtp.precision.weight_grads import DeferrableLayer, WeightGradQueue, attach_queue, run

FP32_SUM = 1e-5
"""Of the largest entry: fp32 products of a few hundred terms against float64."""


def tensor(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(width: int, outer: int) -> Linear:
    layer = Linear(width, outer)
    layer.weight.data = tensor(outer, width, seed=2, scale=0.1)
    attach_fp8(layer, EmulatedBackend())
    return layer


class StackedLinears(DeferrableLayer):
    """Experts with one linear layer each, ``counts`` rows of the input for each."""

    def __init__(self, counts: list[int], width: int, outer: int) -> None:
        super().__init__()
        self.counts = counts
        self.weight = nn.Parameter(tensor(len(counts), outer, width, seed=2, scale=0.1))
        attach_fp8(self, EmulatedBackend())

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor(self.counts).cumsum(0).to(torch.int32)
        return fp8_linear(x, self.weight, self, RowTiles.of(ends, len(x)))


def close(name: str, found: Tensor | None, expected: Tensor, bound: float = FP32_SUM) -> None:
    assert found is not None, f"{name} is missing"
    assert found.shape == expected.shape, f"{name}: {found.shape} != {expected.shape}"
    if expected.numel():
        worst = float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        assert worst <= bound, f"{name} is off by {worst:.2e} of its largest entry, more than {bound:.0e}"


class TestAgainstTheRecipeInFloat64:
    """Quantised operands are the reference's bit for bit, so fp32 rounding is all that products may differ by.

    A breach: gradients quantised along the wrong dimension (1e-2), a scale of a neighbouring tile (1e0).
    """

    @pytest.mark.parametrize("sizes", [(1, 7, 5), (130, 140, 129), (256, 128, 384)], ids=str)
    def test_linear(self, sizes: tuple[int, int, int]) -> None:
        rows, width, outer = sizes
        layer = dense(width, outer)
        x, grad_y = tensor(rows, width, seed=1).requires_grad_(), tensor(rows, outer, seed=3)
        y = layer(x)
        y.backward(grad_y)
        expected = fp8_reference.linear(x.detach(), layer.weight.detach(), grad_y)
        for name, found, wanted in zip(
            ("y", "grad_x", "grad_w"), (y, x.grad, layer.weight.grad), expected, strict=True
        ):
            close(name, None if found is None else found.detach(), wanted)

    @pytest.mark.parametrize("counts", [[3, 0, 130], [0, 0], [0, 5], [128, 1]], ids=str)
    def test_experts(self, counts: list[int]) -> None:
        layer = StackedLinears(counts, 130, 20)
        x, grad_y = tensor(sum(counts), 130, seed=1).requires_grad_(), tensor(sum(counts), 20, seed=3)
        y = layer(x)
        y.backward(grad_y)
        parts = [
            fp8_reference.linear(x_e, w_e, g_e) if len(x_e) else (g_e.double(), x_e.double(), torch.zeros_like(w_e))
            for x_e, w_e, g_e in zip(
                x.detach().split(counts), layer.weight.detach().unbind(), grad_y.split(counts), strict=True
            )
        ]
        close("y", y.detach(), torch.cat([p[0] for p in parts]))
        close("grad_x", x.grad, torch.cat([p[1] for p in parts]))
        close("grad_w", layer.weight.grad, torch.stack([p[2] for p in parts]))

    def test_swiglu_is_computed_again_from_its_quantised_inputs(self) -> None:
        """The forward uses gate and up as they are, the backward as FP8 kept them."""
        rows, width, outer = 130, 140, 20
        layer = dense(width, outer)
        gate, up = (tensor(rows, width, seed=seed).requires_grad_() for seed in (4, 5))
        grad_y = tensor(rows, outer, seed=3)
        y = fp8_swiglu_linear((gate, up), layer.weight, layer)
        y.backward(grad_y)

        weight = rounded(layer.weight.detach(), (128, 128))
        with torch.no_grad():
            hidden = F.silu(gate) * up
        close("y", y.detach(), rounded(hidden, (1, 128)) @ weight.t())
        kept = [rounded(part.detach(), (1, 128)).float().requires_grad_() for part in (gate, up)]
        again = F.silu(kept[0]) * kept[1]
        again.backward((rounded(grad_y, (1, 128)) @ weight).float())
        close("grad_gate", gate.grad, kept[0].grad)  # type: ignore[arg-type]
        close("grad_up", up.grad, kept[1].grad)  # type: ignore[arg-type]
        close("grad_w", layer.weight.grad, rounded(grad_y, (128, 1)).t() @ rounded(again.detach(), (128, 1)), 1e-4)


def feed_forward(backend: bool = True) -> FeedForward:
    module = FeedForward(140, 150)
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = tensor(*parameter.shape, seed=seed, scale=0.1)
    if backend:
        attach_fp8(module, EmulatedBackend())
    return module


def gradients(module: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Output, input gradient and weight gradients of one backward."""
    x = tensor(2, 65, 140, seed=9).requires_grad_()
    y = (call or module)(x)
    y.backward(tensor(*y.shape, seed=10))
    assert x.grad is not None
    weights = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **weights}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), f"{found.keys()} != {expected.keys()}"
    for name, wanted in expected.items():
        assert torch.equal(found[name], wanted), f"{name}: {found[name]} != {wanted}"


class TestSameNumbers:
    """How the backward is run changes no bit."""

    def test_withheld_weight_gradients(self) -> None:
        expected = gradients(feed_forward())
        module, queue = feed_forward(), WeightGradQueue()
        attach_queue(module, queue)
        queue.deferring = True
        before = gradients(module)
        assert before.keys() == {"y", "x"}, f"{before.keys()} before they were asked for"
        run(queue.take())
        equal(before | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, expected)

    @pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
    def test_recomputed(self, reentrant: bool) -> None:
        module = feed_forward()
        found = gradients(module, lambda x: checkpoint(module, x, use_reentrant=reentrant))
        equal(found, gradients(feed_forward()))

    def test_one_quantised_input_for_two_layers(self) -> None:
        alone = [gradients(layer) for layer in (dense(140, 20), dense(140, 20))]
        first, second = dense(140, 20), dense(140, 20)
        x = tensor(2, 65, 140, seed=9).requires_grad_()
        y_1, y_2 = project(x, first, second)
        torch.autograd.backward((y_1, y_2), (tensor(*y_1.shape, seed=10), tensor(*y_2.shape, seed=10)))
        assert torch.equal(y_1, alone[0]["y"])
        assert torch.equal(x.grad, alone[0]["x"] + alone[1]["x"])  # type: ignore[arg-type]
        assert torch.equal(second.weight.grad, alone[1]["weight"])  # type: ignore[arg-type]

    def test_gate_and_up_side_by_side(self) -> None:
        """Experts have one tensor of both; with widths of whole tiles or not, it is the same as two tensors."""
        layer = dense(140, 20)
        both = tensor(30, 280, seed=4).requires_grad_()
        fp8_swiglu_linear((both,), layer.weight, layer).backward(tensor(30, 20, seed=3))
        gate, up = (part.detach().clone().requires_grad_() for part in both.chunk(2, dim=1))
        fp8_swiglu_linear((gate, up), layer.weight, layer).backward(tensor(30, 20, seed=3))
        assert torch.equal(both.grad, torch.cat((gate.grad, up.grad), dim=1))  # type: ignore[arg-type]

    def test_main_grad_gets_fp32(self) -> None:
        """bf16 weights: their gradient reaches the accumulator without ever being rounded to bf16."""
        layer = dense(140, 20)
        layer.weight.data = layer.weight.data.bfloat16()
        layer.weight.main_grad = torch.zeros(20, 140)  # type: ignore[assignment]
        x = tensor(30, 140, seed=1).bfloat16().requires_grad_()
        layer(x).backward(tensor(30, 20, seed=3).bfloat16())
        main_grad = layer.weight.main_grad
        assert layer.weight.grad is None
        assert isinstance(main_grad, Tensor)
        assert not torch.equal(main_grad, main_grad.bfloat16().float()), "no bits beyond those of bf16"


class TestWeightsAreQuantizedOncePerStep:
    """However many microbatches, evaluations and backwards there are between two updates."""

    def test_cached_until_they_change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[None] = []
        original = EmulatedBackend.quantize_weight

        def counting(self: EmulatedBackend, weight: Tensor, *, power_of_two: bool) -> object:
            calls.append(None)
            return original(self, weight, power_of_two=power_of_two)

        monkeypatch.setattr(EmulatedBackend, "quantize_weight", counting)
        module = feed_forward(backend=False)
        fp8 = attach_fp8(module, EmulatedBackend())
        for _ in range(3):
            gradients(module)
        with torch.no_grad():
            module(tensor(4, 140, seed=1))
        assert len(calls) == 3, f"{len(calls)} quantisations of three weights"
        before = gradients(module)["y"]
        with torch.no_grad():
            module.up_proj.weight.mul_(2)
        assert not torch.equal(gradients(module)["y"], before), "a weight changed, the output did not"
        assert len(calls) == 4, f"{len(calls)}, but one weight changed"
        module.down_proj.weight.data.mul_(2)  # as DeepSpeed does, unseen by the version counter
        fp8.forget_weights()
        gradients(module)
        assert len(calls) == 7, f"{len(calls)}, but all weights were to be forgotten"


def saved_bytes(run_forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes that autograd keeps of one forward, each storage once, without parameters."""
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = run_forward()
    assert output.requires_grad
    return sum(storages.values())


def test_fp8_keeps_less_for_the_backward() -> None:
    """bf16 keeps input, gate, up and their product: 4 widths x 2 bytes. FP8: input, gate and up at 1 byte and a 32nd each."""
    tokens, width, inner = 256, 256, 512
    found = {}
    for in_fp8 in (False, True):
        module = FeedForward(width, inner).bfloat16()
        nn.init.normal_(module.gate_proj.weight)
        if in_fp8:
            attach_fp8(module, EmulatedBackend())
        x = tensor(tokens, width, seed=1).bfloat16().requires_grad_()
        found[in_fp8] = saved_bytes(lambda m=module, x=x: m(x), list(module.parameters()))  # type: ignore[misc]
    expected = {False: tokens * 2 * (width + 3 * inner), True: tokens * (width + 2 * inner) * (1 + 4 / 128)}
    assert found == expected, f"{found} != {expected}"


def test_evaluation_makes_nothing_for_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither column tiles nor copies of a SwiGLU's inputs; outputs are those of training."""
    expected = gradients(feed_forward())["y"]
    calls: list[str] = []
    for name in ("quantize_both", "quantize_columns"):
        monkeypatch.setattr(EmulatedBackend, name, lambda *args, name=name, **kwargs: calls.append(name))
    rows = EmulatedBackend.quantize_rows

    def counting(self: EmulatedBackend, x: Tensor, *, power_of_two: bool) -> object:
        calls.append("quantize_rows")
        return rows(self, x, power_of_two=power_of_two)

    monkeypatch.setattr(EmulatedBackend, "quantize_rows", counting)
    with torch.no_grad():
        found = feed_forward()(tensor(2, 65, 140, seed=9))
    assert torch.equal(found, expected)
    assert calls == ["quantize_rows"] * 2, f"{calls}: gate and up have one input, and down its own"


@pytest.mark.parametrize("keep", [["down_proj"], ["gate_proj"], ["*"]], ids=str)
def test_layers_that_stay(keep: list[str]) -> None:
    """A mixture runs, and layers that stay multiply as without FP8."""
    module = feed_forward(backend=False)
    exact = gradients(module)
    module.zero_grad()
    fp8 = attach_fp8(module, EmulatedBackend(), keep_bf16=keep)
    mixed = gradients(module)
    stays = {name for name in ("gate_proj", "up_proj", "down_proj") if keep in (["*"], [name])}
    assert fp8.layers.keys() == {"gate_proj", "up_proj", "down_proj"} - stays
    assert torch.equal(mixed["y"], exact["y"]) == (keep == ["*"])
    x = tensor(2, 65, 140, seed=9)
    gate, up = project(x, module.gate_proj, module.up_proj)
    for name, output, weight in (("gate_proj", gate, module.gate_proj.weight), ("up_proj", up, module.up_proj.weight)):
        assert torch.equal(output, x @ weight.t()) == (name in stays), name
    worst = float((mixed["y"] - exact["y"]).norm() / exact["y"].norm())
    assert worst < 0.1, f"{worst}"


@pytest.mark.parametrize("keep", [["down_proj"], ["gate_proj"], ["up_proj"]], ids=str)
def test_layers_that_stay_withheld_and_recomputed(keep: list[str]) -> None:
    """In a mixture, too, how the backward is run changes no bit."""

    def mixture() -> FeedForward:
        module = feed_forward(backend=False)
        attach_fp8(module, EmulatedBackend(), keep_bf16=keep)
        return module

    expected = gradients(mixture())
    module, queue = mixture(), WeightGradQueue()
    attach_queue(module, queue)
    queue.deferring = True
    before = gradients(module, lambda x: checkpoint(module, x, use_reentrant=False))
    run(queue.take())
    equal(before | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, expected)


def test_one_layer_used_twice() -> None:
    """As MTP depths that share a module do: its gradients add up, withheld or not."""
    found = []
    for deferring in (False, True):
        layer, queue = dense(140, 140), WeightGradQueue()
        attach_queue(layer, queue)
        queue.deferring = deferring
        x = tensor(30, 140, seed=9).requires_grad_()
        first = layer(x)
        layer(first).backward(tensor(30, 140, seed=10))
        run(queue.take())
        found.append(layer.weight.grad)
    inner = layer(x).detach()
    grad = tensor(30, 140, seed=10)
    (dy_1,) = torch.autograd.grad(layer(inner.requires_grad_()), inner, grad)
    expected = rounded(grad, (128, 1)).t() @ rounded(inner.detach(), (128, 1))
    expected += rounded(dy_1, (128, 1)).t() @ rounded(x.detach(), (128, 1))
    for weight_grad in found:
        close("grad_w", weight_grad, expected)


def test_frozen_weight() -> None:
    layer = dense(140, 20)
    layer.weight.requires_grad_(False)
    layer.weight.main_grad = torch.zeros(20, 140)  # type: ignore[assignment]
    x = tensor(30, 140, seed=1).requires_grad_()
    layer(x).backward(tensor(30, 20, seed=3))
    assert x.grad is not None
    assert not layer.weight.main_grad.any()  # type: ignore[operator]


def test_experts_scales_are_those_of_their_rows_on_the_wire() -> None:
    """Rows that come in FP8 have powers of two; another scale would round them once more."""
    model = nn.ModuleDict({"experts": Linear(4, 4), "self_attn": Linear(4, 4)})
    fp8 = attach_fp8(model, EmulatedBackend(), fp8_dispatch=True)
    found = {name: layer.power_of_two for name, layer in fp8.layers.items()}
    assert found == {"experts": True, "self_attn": False}, found
