"""Routing, expert computation, their gradients and auxiliary losses against Hugging Face's layers and naive formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model.model_cases import config_of, max_difference
from support.hf_moe import hf_layer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dist_mtp.config import Config, MoeConfig
from dist_mtp.model.init import initialize
from dist_mtp.model.moe import MoE
from dist_mtp.model.router import Router

TOLERANCE = 1e-5
"""Of the largest entry: fp32 sums in another order."""
RECOMPUTE = ["", "reentrant", "non-reentrant"]


def moe_layer(config: Config) -> MoE:
    layer = MoE(config)
    initialize(layer, seed=5, std=0.3)
    return layer


def inputs(tokens: int, width: int = 32, seed: int = 6, rows: int = 1) -> Tensor:
    """[B, T, D]."""
    return torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed))


def forward(module: Callable[[Tensor], Tensor], x: Tensor, recompute: str = "") -> Tensor:
    """``module(x)``, its activations dropped and recomputed in the backward if ``recompute`` says how."""
    return checkpoint(module, x, use_reentrant=recompute == "reentrant") if recompute else module(x)


def with_gradients(layer: torch.nn.Module, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """Output, input gradient and every parameter's gradient."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad_y)
    assert x.grad is not None
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in layer.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **grads}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys(), f"{sorted(ours)} != {sorted(theirs)}"
    for name, expected in theirs.items():
        difference, scale = max_difference(ours[name], expected), float(expected.abs().max())
        assert difference <= TOLERANCE * max(scale, 1e-3), f"{name}: differ by {difference}, largest entry {scale}"


class TestAgainstHuggingFace:
    """Output and all gradients equal those of ``DeepseekV3MoE``, however tokens fall onto experts.

    A breach: rows of one expert multiplied by another's weights, or a gradient that an empty expert shifts.
    """

    @pytest.mark.parametrize("tokens", [1, 2, 3, 40])
    @pytest.mark.parametrize("normalised", [True, False])
    def test_forward_and_backward(self, tokens: int, normalised: bool) -> None:
        """With 1 to 3 tokens most experts are empty."""
        config = config_of(norm_topk_prob=normalised)
        layer = moe_layer(config)
        layer.gate.e_score_correction_bias.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(7))
        x, grad_y = inputs(tokens), inputs(tokens, seed=8)
        theirs = with_gradients(hf_layer(layer, config), x, grad_y)
        vanishing = [name for name, each in theirs.items() if not each.any()]
        assert not vanishing, f"{vanishing} are zero: nothing is compared"
        assert_close(with_gradients(layer, x, grad_y), theirs)

    @pytest.mark.parametrize("expert", [0, 5, 7])
    def test_all_tokens_on_one_expert(self, expert: int) -> None:
        config = config_of(num_experts_per_tok=1, norm_topk_prob=False)
        layer = moe_layer(config)
        layer.gate.e_score_correction_bias[expert] = 10.0
        x, grad_y = inputs(9), inputs(9, seed=8)
        theirs = with_gradients(hf_layer(layer, config), x, grad_y)
        ours = with_gradients(layer, x, grad_y)
        assert_close(ours, theirs)
        used = ours["experts.down_proj"].flatten(1).abs().sum(dim=1).nonzero().flatten().tolist()
        assert used == [expert], f"experts with gradients: {used} != {[expert]}"

    def test_deepseek_v2(self) -> None:
        """``group_score: max`` and softmax scores; the sum of two would choose other groups."""
        settings = {"scoring_func": "softmax", "norm_topk_prob": False}
        config = config_of(group_score="max", **settings)
        layer, x, grad_y = moe_layer(config), inputs(40), inputs(40, seed=8)
        assert_close(with_gradients(layer, x, grad_y), with_gradients(hf_layer(layer, config), x, grad_y))
        by_sum = moe_layer(config_of(group_score="top2_sum", **settings))
        assert not torch.equal(by_sum.gate(x).ids_TK, layer.gate(x).ids_TK), "both group scores choose alike"


class TestRouting:
    """Choice, weights and counts follow the formulas."""

    def test_bias_steers_the_choice_but_not_the_weights(self) -> None:
        config = config_of(n_group=1, topk_group=1, num_experts_per_tok=1, norm_topk_prob=False)
        gate = moe_layer(config).gate
        gate.e_score_correction_bias[3] = 10.0
        x = inputs(5)
        routing = gate(x)
        expected = config.model.routed_scaling_factor * torch.sigmoid(x[0] @ gate.weight[3])
        assert routing.ids_TK.flatten().tolist() == [3] * 5, f"{routing.ids_TK.flatten().tolist()} != all 3"
        assert max_difference(routing.weights_TK[:, 0], expected) < 1e-6, f"{routing.weights_TK[:, 0]} != {expected}"
        assert routing.counts_E.tolist() == [0, 0, 0, 5, 0, 0, 0, 0], f"{routing.counts_E.tolist()}: not 5 on expert 3"

    def test_groups_limit_the_choice(self) -> None:
        """Scores 0.9 0.1 | 0.6 0.5 | 0.55 0.3 | 0.2 0.2, the best group of four: 0 loses with its weak partner."""
        config = config_of(hidden_size=8, num_experts_per_tok=2, n_group=4, topk_group=1, norm_topk_prob=False)
        gate = moe_layer(config).gate
        scores = torch.tensor([0.9, 0.1, 0.6, 0.5, 0.55, 0.3, 0.2, 0.2])
        with torch.no_grad():
            gate.weight.copy_(torch.logit(scores).diag())
        ids = gate(torch.ones(1, 1, 8)).ids_TK
        assert sorted(ids[0].tolist()) == [2, 3], f"{sorted(ids[0].tolist())} != [2, 3]"

    def test_softmax_without_normalisation(self) -> None:
        """DeepSeek-V2: probabilities over all experts, the K largest as they are, times the factor."""
        config = config_of(
            scoring_func="softmax", norm_topk_prob=False, n_group=1, topk_group=1, routed_scaling_factor=1.5
        )
        layer = moe_layer(config)
        x = inputs(11)
        shared = layer.shared_experts(x[0])
        expected = torch.empty_like(shared)
        for token in range(11):
            probabilities = torch.softmax(layer.gate.weight @ x[0, token], dim=0)
            top = probabilities.topk(config.model.num_experts_per_tok)
            expected[token] = shared[token]
            for probability, expert in zip(top.values, top.indices.tolist(), strict=True):
                gate, up = (layer.experts.gate_up_proj[expert] @ x[0, token]).chunk(2)
                expected[token] += 1.5 * probability * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
        ours = layer(x)[0]
        difference, scale = max_difference(ours, expected), float(expected.detach().abs().max())
        assert difference <= TOLERANCE * scale, f"differ by {difference} of {scale}: {ours[0]} != {expected[0]}"

    def test_no_shared_experts(self) -> None:
        """The layer is the routed part alone."""
        layer = moe_layer(config_of())
        x = inputs(6)
        routed_only = moe_layer(config_of(n_shared_experts=0))
        expected = layer(x) - layer.shared_experts(x)
        assert max_difference(routed_only(x), expected) <= 1e-5 * expected.abs().max(), f"{routed_only(x)} {expected}"


class TestCounts:
    """The router's ``load`` and the experts' ``processed`` hold the slots per expert since they were last emptied: once per
    microbatch whose backward ran, however often its forward did.

    A breach: a recomputed or evaluated microbatch moves the balancing bias.
    """

    @pytest.mark.parametrize("recompute", RECOMPUTE)
    def test_once_per_backward(self, recompute: str) -> None:
        layer = moe_layer(config_of())
        expected = torch.zeros(8, dtype=torch.int64)
        for seed in (1, 2):
            x = inputs(13, seed=seed).requires_grad_()
            expected += layer.gate(x).counts_E
            forward(layer, x, recompute).sum().backward()
        assert int(expected.sum()) == 2 * 13 * 3, f"{expected.tolist()} is not 2 x 13 tokens x 3 experts"
        for name, counted in (("load", layer.gate.load), ("processed", layer.experts.processed)):
            assert torch.equal(counted, expected), f"{name}: {counted.tolist()} != {expected.tolist()}"

    def test_forward_and_evaluation_do_not_count(self) -> None:
        """Neither a forward that nothing follows, nor evaluation, even with gradients."""
        layer = moe_layer(config_of())
        layer(inputs(4))
        with torch.no_grad():
            layer(inputs(4))
        layer.eval()
        layer(inputs(9).requires_grad_()).sum().backward()
        for name, counted in (("load", layer.gate.load), ("processed", layer.experts.processed)):
            assert not counted.any(), f"{name}: {counted.tolist()}, expected zeros"


COEFFICIENTS = [(0.7, 0.0, 0.0), (0.0, 0.9, 0.0), (0.0, 0.0, 0.3), (0.7, 0.9, 0.3)]


def router_of(coefficients: tuple[float, ...], micro_batches: int = 1, **model: Any) -> Router:
    """A router in float64 with biases and loads other than the initial ones."""
    config = config_of(**model)
    config = dataclasses.replace(
        config,
        moe=MoeConfig(
            **{f"{name}_loss_coeff": each for name, each in zip(MoeConfig().aux_loss_coeffs, coefficients, strict=True)}
        ),
        train=dataclasses.replace(config.train, micro_batches=micro_batches),
    )
    gate = moe_layer(config).gate.double()
    generator = torch.Generator().manual_seed(9)
    gate.e_score_correction_bias.uniform_(-0.3, 0.3, generator=generator)
    gate.load_share.uniform_(0, 2, generator=generator)
    return gate


def naive_losses(gate: Router, x_BTD: Tensor) -> list[Tensor]:
    """Sequence-wise, global and z loss, term by term."""
    experts, top_k = gate.weight.shape[0], gate.settings.num_experts_per_tok
    rows, tokens, _ = x_BTD.shape
    seq_aux = global_aux = z = torch.zeros((), dtype=torch.float64)
    for row in range(rows):
        frequency, share = [0.0] * experts, [torch.zeros(())] * experts
        for token in range(tokens):
            logits = gate.weight @ x_BTD[row, token]
            scores = 1 / (1 + (-logits).exp()) if gate.settings.scoring_func == "sigmoid" else logits.exp()
            normalised = scores / scores.sum()  # (19)
            z = z + logits.exp().sum().log() ** 2 / (rows * tokens)
            for expert, score in enumerate(scores.tolist()):
                better = sum(other > score for other in scores.tolist())
                frequency[expert] += experts / (top_k * tokens) * (better < top_k)  # (18)
                share[expert] = share[expert] + normalised[expert] / tokens  # (20)
        for expert in range(experts):  # (17)
            seq_aux = seq_aux + frequency[expert] * share[expert] / rows
            global_aux = global_aux + float(gate.load_share[expert]) * share[expert] / rows
    return [seq_aux, global_aux, z]


def router_gradients(gate: Router, x: Tensor, grad_weights: Tensor, recompute: str = "") -> dict[str, Tensor]:
    """Gradients of the routed weights times ``grad_weights`` and of whatever the router adds."""
    x = x.clone().requires_grad_()
    gate.zero_grad()
    forward(lambda x_BTD: gate(x_BTD).weights_TK, x, recompute).backward(grad_weights)
    assert x.grad is not None
    assert gate.weight.grad is not None
    return {"input": x.grad, "router": gate.weight.grad.clone()}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To float64 rounding."""
    for name in expected:
        difference, scale = max_difference(ours[name], expected[name]), float(expected[name].abs().max())
        assert difference <= 1e-12 * scale, f"{name}: differ by {difference}, largest entry {scale}"


class TestAuxiliaryLosses:
    """The router adds exactly coefficient times loss to the objective, in the mean over the rows of all microbatches:
    sequence-wise loss (arXiv 2412.19437, equations 17 to 20), the same with the loads of the step before, z-loss.

    A breach: gradients that scale with the number of microbatches, that recomputation doubles, or that use the choice after
    bias and group limit, which the equations do not.
    """

    @pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
    @pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
    def test_values_and_gradients(self, coefficients: tuple[float, ...], scoring: str) -> None:
        gate = router_of(coefficients, scoring_func=scoring)
        x, grad_weights = inputs(7, rows=3).double(), inputs(21, width=3, seed=10)[0].double()
        ours = router_gradients(gate, x, grad_weights)
        plain = router_gradients(router_of((0, 0, 0), scoring_func=scoring), x, grad_weights)
        x = x.requires_grad_()
        losses = naive_losses(gate, x)
        total = sum(c * loss for c, loss in zip(coefficients, losses, strict=True))
        grads = torch.autograd.grad(total, (x, gate.weight))
        for name, grad in zip(("input", "router"), grads, strict=True):
            assert float(grad.abs().max()) > 1e-3 * float(plain[name].abs().max()), f"{name}: too small to be compared"
        assert_same(ours, {name: plain[name] + grad for name, grad in zip(("input", "router"), grads, strict=True)})
        # Losses that are off are not computed.
        expected = torch.stack([loss if c else 0 * loss for c, loss in zip(coefficients, losses, strict=True)]).detach()
        assert max_difference(gate.aux_means, expected) <= 1e-12, f"{gate.aux_means.tolist()} != {expected.tolist()}"

    @pytest.mark.parametrize("recompute", RECOMPUTE)
    def test_microbatches_sum_to_the_whole(self, recompute: str) -> None:
        x, grad_weights = inputs(5, rows=6).double(), inputs(30, width=3, seed=10)[0].double()
        whole = router_of(COEFFICIENTS[-1])
        expected = router_gradients(whole, x, grad_weights)
        gate = router_of(COEFFICIENTS[-1], micro_batches=3)
        parts = [
            router_gradients(gate, *part, recompute) for part in zip(x.chunk(3), grad_weights.chunk(3), strict=True)
        ]
        ours = {
            "input": torch.cat([part["input"] for part in parts]),
            "router": torch.stack([part["router"] for part in parts]).sum(dim=0),
        }
        assert_same(ours, expected)
        assert max_difference(gate.aux_means, whole.aux_means) <= 1e-12, f"{gate.aux_means} != {whole.aux_means}"
        assert torch.equal(gate.load, whole.load), f"{gate.load.tolist()} != {whole.load.tolist()}"

    def test_evaluation_adds_nothing(self) -> None:
        gate, plain = router_of(COEFFICIENTS[-1]).eval(), router_of((0, 0, 0))
        x, grad_weights = inputs(5).double(), inputs(5, width=3, seed=10)[0].double()
        assert_same(router_gradients(gate, x, grad_weights), router_gradients(plain, x, grad_weights))
        counted = gate.aux_means.tolist(), gate.load.tolist()
        assert counted == ([0.0] * 3, [0] * 8), f"losses and loads {counted}, expected zeros"

    @pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
    def test_balance_is_one(self, scoring: str) -> None:
        """Token t scores expert e by (e - t) mod 8, so every expert is among the best three of three tokens. If all tokens
        are token 0, the loss is 8/3 of the share of its best three."""
        gate = router_of(COEFFICIENTS[-1], hidden_size=8, scoring_func=scoring)
        logits = torch.linspace(-1, 1, 8).double()
        with torch.no_grad():
            gate.weight.copy_(torch.stack([logits.roll(token) for token in range(8)], dim=1))
            gate.load_share.fill_(1)
        share = logits.sigmoid() / logits.sigmoid().sum() if scoring == "sigmoid" else logits.softmax(0)
        one_hot = torch.eye(8).double()
        cases = [(one_hot, 1.0), (one_hot[:1].expand(8, 8), 8 / 3 * float(share[-3:].sum()))]
        for x, expected in cases:
            gate.aux_means.zero_()
            router_gradients(gate, x[None], torch.zeros(8, 3).double())
            seq_aux, global_aux = gate.aux_means.tolist()[:2]
            assert abs(seq_aux - expected) < 1e-12, f"sequence-wise loss {seq_aux}, expected {expected}"
            assert abs(global_aux - 1) < 1e-12, f"global loss {global_aux} under equal loads, expected 1"
