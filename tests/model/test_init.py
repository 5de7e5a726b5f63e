"""Initial weights are a function of the seed and the logical name alone."""

from __future__ import annotations

import pytest
import torch
from model.model_cases import build, config_of, logical_parameters, unit_names

from dist_mtp.model.init import initialize, tensor_seed
from dist_mtp.model.transformer import LanguageModel


class TestLayouts:
    """A rank that holds some units starts with the weights that these units have in a whole model.

    A breach: runs with other pipeline layouts start from other models and cannot be compared.
    """

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("part", ["first_half", "second_half", "every_other", "v_ends"])
    def test_part_equals_whole(self, part: str, tied: bool) -> None:
        config = config_of(2, tie_word_embeddings=tied)
        units = unit_names(config)
        held = {
            "first_half": units[:4],
            "second_half": units[4:],
            "every_other": units[::2],
            "v_ends": [*units[:2], *units[-2:]],
        }[part]
        whole, rank = (logical_parameters(model) for model in (build(config), build(config, units=held)))
        assert rank.keys() <= whole.keys(), f"names of no whole model: {rank.keys() - whole.keys()}"
        assert len(rank) > 1
        for name, tensor in rank.items():
            assert torch.equal(tensor, whole[name]), f"{name}: {tensor.flatten()[:3]} != {whole[name].flatten()[:3]}"

    def test_experts_depend_on_their_number_alone(self) -> None:
        """A model with fewer experts holds the first ones: what expert parallelism will slice."""
        eight, four = (logical_parameters(build(config_of(n_routed_experts=n, n_group=2))) for n in (8, 4))
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        assert torch.equal(eight[name], four[name]), f"{eight[name]} != {four[name]}"

    def test_each_tensor_has_its_own_generator(self) -> None:
        """Whatever is fused in memory: values come from a generator seeded for this name alone."""
        for name, tensor in logical_parameters(build(config_of())).items():
            if tensor.dim() > 1:
                generator = torch.Generator().manual_seed(tensor_seed(1, name))
                expected = torch.empty(tensor.shape).normal_(0.0, 0.2, generator=generator)
                assert torch.equal(tensor, expected), f"{name}: {tensor.flatten()[:3]} != {expected.flatten()[:3]}"

    def test_other_code_draws_nothing_from_it(self) -> None:
        """Neither the global generator nor a second call changes the result."""
        config = config_of()
        first = logical_parameters(build(config))
        torch.manual_seed(99)
        model = LanguageModel(config, unit_names(config))
        after_construction = torch.get_rng_state()
        for _ in range(2):
            initialize(model, seed=1, std=config.model.initializer_range)
        assert torch.equal(after_construction, torch.get_rng_state()), "initialize draws from the global generator"
        for name, tensor in logical_parameters(model).items():
            assert torch.equal(tensor, first[name]), f"{name}: {tensor.flatten()[:3]} != {first[name].flatten()[:3]}"


class TestValues:
    """Matrices are normal with the configured deviation and independent of one another; norms are ones."""

    def test_distribution(self) -> None:
        config = config_of(hidden_size=64, intermediate_size=256, initializer_range=0.006)
        for name, tensor in logical_parameters(build(config)).items():
            if tensor.dim() == 1:
                assert torch.equal(tensor, torch.ones_like(tensor)), f"{name}: {tensor} != ones"
                continue
            # Five standard errors of a sample of this size.
            spread = 5 * 0.006 / (2 * tensor.numel()) ** 0.5
            std, mean = float(tensor.std()), float(tensor.mean())
            assert abs(std - 0.006) < spread, f"{name}: standard deviation {std} != 0.006 +- {spread}"
            assert abs(mean) < 5 * 0.006 / tensor.numel() ** 0.5, f"{name}: mean {mean}"

    def test_tensors_differ(self) -> None:
        """No two matrices start with the same numbers: not two experts, layers or MTP depths either."""
        starts: dict[tuple[float, ...], str] = {}
        for name, tensor in logical_parameters(build(config_of(2))).items():
            if tensor.dim() > 1:
                start = tuple(tensor.flatten()[:4].tolist())
                assert start not in starts, f"{name} and {starts[start]} both start with {start}"
                starts[start] = name

    def test_seeds_differ(self) -> None:
        one, two = (logical_parameters(build(config_of(), seed=seed)) for seed in (1, 2))
        for name, tensor in one.items():
            if tensor.dim() > 1:
                assert not torch.equal(tensor, two[name]), f"{name} is {tensor.flatten()[:3]} for both seeds"

    def test_router_bias_starts_at_zero(self) -> None:
        bias = build(config_of()).get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
        assert not bias.any(), f"{bias} != 0"

    def test_seed_is_pinned(self) -> None:
        """Another derivation would start every old run from other weights."""
        found, expected = tensor_seed(1234, "lm_head.weight"), 3473674807390751854
        assert found == expected, f"{found} != {expected}"

    def test_lower_precision_rounds_the_same_numbers(self) -> None:
        config = config_of()
        model = LanguageModel(config, unit_names(config)).to(torch.bfloat16)
        initialize(model, seed=1, std=config.model.initializer_range)
        wide = logical_parameters(build(config))
        for name, tensor in logical_parameters(model).items():
            assert torch.equal(tensor, wide[name].bfloat16()), f"{name}: {tensor} != {wide[name].bfloat16()}"
