"""Published sizes, on the meta device: no memory, and the very modules that training builds."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from model.model_cases import unit_names

from dist_mtp.cli.compose import compose, config_groups
from dist_mtp.config import Config, resolve
from dist_mtp.linear_names import linear_names
from dist_mtp.model.naming import logical_tensors
from dist_mtp.model.transformer import LanguageModel
from dist_mtp.pipeline.costs import list_units, num_parameters, unit_costs
from dist_mtp.pipeline.devices import PROFILES
from dist_mtp.precision.fp8.emulated import EmulatedBackend
from dist_mtp.precision.fp8.layer import attach_fp8
from dist_mtp.precision.fp8.statistics import KINDS


def shipped(*overrides: str) -> Config:
    return resolve(compose(overrides), vocab_size=257)


def meta_model(config: Config, units: Collection[str] | None = None) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(config, units or unit_names(config))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class TestPublishedSizes:
    """The shipped models have the published numbers of parameters."""

    def test_deepseek_v3(self) -> None:
        """Main model 671 B; the released files hold 685 B: the MTP module and its copies of embedding and head too."""
        main = count(meta_model(shipped("model=deepseek_v3", "mtp=off")))
        assert main == 671_026_404_352, f"main model: {main} != 671026404352"
        model = meta_model(shipped("model=deepseek_v3", "mtp=d1"))
        module = count(model.mtp_module(1))
        assert module == 11_610_067_968, f"MTP module: {module} != 11610067968"
        assert count(model) == main + module, f"with MTP: {count(model)} != {main} + {module}"
        copies = count(model.model.embed_tokens) + count(model.lm_head)
        released = main + module + copies
        assert round(released / 1e9, 1) == 684.5, f"released files: {released} != 684.5e9, reported as 685 B"

    def test_deepseek_v2_lite(self) -> None:
        found = count(meta_model(shipped("model=deepseek_v2_lite", "mtp=off")))
        assert abs(found - 15.7e9) < 0.05e9, f"{found} != 15.7e9"

    def test_small(self) -> None:
        found = count(meta_model(shipped("model=small")))
        assert 25e6 < found < 35e6, f"{found} is not about 30e6"

    def test_tiny(self) -> None:
        """What the comment in conf/model/tiny.yaml says."""
        found = [count(meta_model(shipped("model=tiny", mtp))) for mtp in ("mtp=off", "mtp=d1")]
        assert [round(each / 1e6, 1) for each in found] == [1.4, 1.8], f"{found} != 1.4e6 and 1.8e6"

    def test_router_bias_is_no_parameter(self) -> None:
        """It is moved by the load and not by the optimizer, so it must not be in its reach."""
        model = meta_model(shipped("model=tiny"))
        biases = [name for name, _ in model.named_parameters() if "e_score_correction_bias" in name]
        assert not biases, f"{biases} are parameters"


class TestPlannerAgrees:
    """The planner's parameter counts are those of the modules, unit by unit, for every shipped model and MTP kind."""

    @pytest.mark.parametrize("mtp", config_groups()["mtp"])
    @pytest.mark.parametrize("model", config_groups()["model"])
    def test_whole_model(self, model: str, mtp: str) -> None:
        config = shipped(f"model={model}", f"mtp={mtp}")
        built, planned = count(meta_model(config)), num_parameters(config)
        assert built == planned, f"the modules have {built} parameters, the planner counts {planned}"

    @pytest.mark.parametrize(
        "override",
        ["mtp.block=dense", "model.tie_word_embeddings=true", "model.q_lora_rank=null", "model.n_shared_experts=0"],
    )
    def test_variants(self, override: str) -> None:
        config = shipped("model=tiny", "mtp=d2", override)
        built, planned = count(meta_model(config)), num_parameters(config)
        assert built == planned, f"the modules have {built} parameters, the planner counts {planned}"

    @pytest.mark.parametrize("tied", ["true", "false"])
    def test_each_unit(self, tied: str) -> None:
        """A unit built alone; the head's replica of the embedding is the owner's, so the planner does not count it."""
        config = shipped("model=tiny", "mtp=d2", f"model.tie_word_embeddings={tied}")
        for unit, cost in zip(list_units(config), unit_costs(config, PROFILES["cpu"]), strict=True):
            model = meta_model(config, {unit.name})
            replica = count(model.model.embed_tokens) if model.holds_replica else 0
            built = count(model) - replica
            assert built == cost.params, f"{unit.name}: the modules have {built}, the planner counts {cost.params}"


class TestNames:
    """Logical names cover every element once, and are those of the released checkpoint."""

    def test_deepseek_v3_names(self) -> None:
        model = meta_model(shipped("model=deepseek_v3", "mtp=d1"))
        names: list[str] = []
        for name, parameter in model.named_parameters():
            logical = logical_tensors(name, tuple(parameter.shape))
            elements = sum(tensor.numel for tensor in logical)
            assert elements == parameter.numel(), f"{name}: {elements} elements under names != {parameter.numel()}"
            names += [tensor.name for tensor in logical]
        assert len(names) == len(set(names)), "two tensors share a name"
        # Three dense layers, 58 + 1 MoE layers of 256 experts.
        experts = sum(".experts." in name for name in names)
        assert experts == 59 * 256 * 3, f"{experts} expert tensors != 59 layers x 256 experts x 3"
        for name in (
            "model.layers.61.enorm.weight",
            "model.layers.61.hnorm.weight",
            "model.layers.61.eh_proj.weight",
            "model.layers.61.shared_head.norm.weight",
            "model.layers.61.mlp.experts.255.up_proj.weight",
            "model.layers.60.mlp.gate.weight",
            "model.layers.2.mlp.gate_proj.weight",
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
            "lm_head.weight",
        ):
            assert name in names, f"{name} is missing"


class TestLinearNames:
    """The names that a configuration's model has for its linear layers are known without building it, and are those of the
    layers that multiply in FP8.

    A breach: a pattern of ``precision.fp8_keep_bf16`` that is refused though it names a layer, or accepted though it does not.
    """

    @pytest.mark.parametrize(
        "overrides",
        [
            ("model=tiny", "mtp=d2"),
            ("model=tiny", "mtp=d3_shared", "model.n_shared_experts=0"),
            ("model=tiny", "mtp=d1", "mtp.block=dense", "model.tie_word_embeddings=true"),
            ("model=deepseek_v2_lite", "mtp=off"),
        ],
        ids=str,
    )
    def test_equal_those_of_the_model(self, overrides: tuple[str, ...]) -> None:
        config = shipped(*overrides)
        fp8 = attach_fp8(meta_model(config), EmulatedBackend())
        names = linear_names(config)
        assert sorted(fp8.layers) == sorted(names), f"differ in {set(fp8.layers) ^ set(names)}"
        kinds = {layer.kind for layer in fp8.layers.values()}
        assert kinds <= set(KINDS), f"{kinds} are not all among {KINDS}"
