"""Routing, expert computation and their gradients against Hugging Face's layer and naive formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model.model_cases import config_of, max_difference
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from dist_mtp.config import ModelConfig
from dist_mtp.model.init import initialize
from dist_mtp.model.moe import MoE

TOLERANCE = 1e-5
"""Of the largest entry: fp32 sums in another order."""


def moe_layer(config: ModelConfig) -> MoE:
    layer = MoE(config)
    initialize(layer, seed=5, std=0.3)
    return layer


def inputs(tokens: int, width: int = 32, seed: int = 6) -> Tensor:
    """[1, T, D]."""
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


def hf_layer(ours: MoE, config: ModelConfig) -> DeepseekV3MoE:
    """Hugging Face's layer with our weights; both fuse gate and up projections alike."""
    names = """hidden_size n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size n_group topk_group
    norm_topk_prob routed_scaling_factor"""
    theirs = DeepseekV3MoE(
        DeepseekV3Config(**{name: getattr(config, name) for name in names.split()}, experts_implementation="eager")
    )
    theirs.load_state_dict(ours.state_dict())
    return theirs


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
        config = config_of(norm_topk_prob=normalised).model
        layer = moe_layer(config)
        layer.gate.e_score_correction_bias.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(7))
        x, grad_y = inputs(tokens), inputs(tokens, seed=8)
        theirs = with_gradients(hf_layer(layer, config), x, grad_y)
        vanishing = [name for name, each in theirs.items() if not each.any()]
        assert not vanishing, f"{vanishing} are zero: nothing is compared"
        assert_close(with_gradients(layer, x, grad_y), theirs)

    @pytest.mark.parametrize("expert", [0, 5, 7])
    def test_all_tokens_on_one_expert(self, expert: int) -> None:
        config = config_of(num_experts_per_tok=1, norm_topk_prob=False).model
        layer = moe_layer(config)
        layer.gate.e_score_correction_bias[expert] = 10.0
        x, grad_y = inputs(9), inputs(9, seed=8)
        theirs = with_gradients(hf_layer(layer, config), x, grad_y)
        ours = with_gradients(layer, x, grad_y)
        assert_close(ours, theirs)
        used = ours["experts.down_proj"].flatten(1).abs().sum(dim=1).nonzero().flatten().tolist()
        assert used == [expert], f"experts with gradients: {used} != {[expert]}"


class TestRouting:
    """Choice, weights and load follow the formulas."""

    def test_bias_steers_the_choice_but_not_the_weights(self) -> None:
        config = config_of(n_group=1, topk_group=1, num_experts_per_tok=1, norm_topk_prob=False).model
        gate = moe_layer(config).gate
        gate.e_score_correction_bias[3] = 10.0
        x = inputs(5)[0]
        ids, weights = gate(x)
        expected = config.routed_scaling_factor * torch.sigmoid(x @ gate.weight[3])
        assert ids.flatten().tolist() == [3] * 5, f"{ids.flatten().tolist()} != all 3"
        assert max_difference(weights[:, 0], expected) < 1e-6, f"{weights[:, 0]} != {expected}"

    def test_groups_limit_the_choice(self) -> None:
        """Scores 0.9 0.1 | 0.6 0.5 | 0.55 0.3 | 0.2 0.2, two groups of four: 0 loses with its weak partner."""
        config = config_of(hidden_size=8, num_experts_per_tok=2, n_group=4, topk_group=1, norm_topk_prob=False).model
        gate = moe_layer(config).gate
        scores = torch.tensor([0.9, 0.1, 0.6, 0.5, 0.55, 0.3, 0.2, 0.2])
        with torch.no_grad():
            gate.weight.copy_(torch.logit(scores).diag())
        ids, _ = gate(torch.ones(1, 8))
        assert sorted(ids[0].tolist()) == [2, 3], f"{sorted(ids[0].tolist())} != [2, 3]"

    def test_softmax_without_normalisation(self) -> None:
        """DeepSeek-V2: probabilities over all experts, the K largest as they are, times the factor."""
        config = config_of(
            scoring_func="softmax", norm_topk_prob=False, n_group=1, topk_group=1, routed_scaling_factor=1.5
        ).model
        layer = moe_layer(config)
        x = inputs(11)
        shared = layer.shared_experts(x[0])
        expected = torch.empty_like(shared)
        for token in range(11):
            probabilities = torch.softmax(layer.gate.weight @ x[0, token], dim=0)
            top = probabilities.topk(config.num_experts_per_tok)
            expected[token] = shared[token]
            for probability, expert in zip(top.values, top.indices.tolist(), strict=True):
                gate, up = (layer.experts.gate_up_proj[expert] @ x[0, token]).chunk(2)
                expected[token] += 1.5 * probability * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
        ours = layer(x)[0]
        difference, scale = max_difference(ours, expected), float(expected.detach().abs().max())
        assert difference <= TOLERANCE * scale, f"differ by {difference} of {scale}: {ours[0]} != {expected[0]}"

    def test_no_shared_experts(self) -> None:
        """The layer is the routed part alone."""
        layer = moe_layer(config_of().model)
        x = inputs(6)
        routed_only = moe_layer(config_of(n_shared_experts=0).model)
        expected = layer(x) - layer.shared_experts(x)
        assert max_difference(routed_only(x), expected) <= 1e-5 * expected.abs().max(), f"{routed_only(x)} {expected}"


class TestLoad:
    """``load`` holds the tokens per expert since it was last emptied; evaluation leaves no trace."""

    def test_counts(self) -> None:
        layer = moe_layer(config_of().model)
        expected = [0] * 8
        for seed in (1, 2):
            x = inputs(13, seed=seed)
            for expert in layer.gate(x[0])[0].flatten().tolist():
                expected[expert] += 1
            layer(x).sum().backward()
        assert layer.gate.load.tolist() == expected, f"{layer.gate.load.tolist()} != {expected}"
        assert sum(expected) == 2 * 13 * 3

    def test_evaluation_does_not_count(self) -> None:
        layer = moe_layer(config_of().model)
        layer(inputs(4))
        before = layer.gate.load.tolist()
        layer.eval()
        layer(inputs(9))
        assert layer.gate.load.tolist() == before, f"{layer.gate.load.tolist()} != {before}"
