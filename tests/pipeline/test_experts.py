"""Expert parallelism: the plan's places and parameters against the modules that ranks build."""

from __future__ import annotations

import pytest
import torch

from dist_mtp.cli.compose import compose
from dist_mtp.config import Config, resolve
from dist_mtp.model.transformer import LanguageModel
from dist_mtp.pipeline.costs import num_parameters
from dist_mtp.pipeline.devices import PROFILES
from dist_mtp.pipeline.experts import ExpertPlan, place_experts
from dist_mtp.pipeline.plan import Plan, make_plan
from dist_mtp.precision.fp8.emulated import EmulatedBackend
from dist_mtp.precision.fp8.layer import attach_fp8

V3 = ("model=deepseek_v3", "parallel.pp=16", "parallel.dp=128", "parallel.ep=64")
V2_LITE = ("model=deepseek_v2_lite", "parallel.pp=4", "parallel.dp=8", "parallel.ep=8")
V = "pipeline.placement=v"
LAST = ("pipeline.placement=last", "pipeline.schedule=1f1b")


def planned(*overrides: str) -> tuple[Config, Plan]:
    # The layout is fixed: which of several equal ones is the fastest is no matter of these tests.
    config = resolve(compose([*overrides, "mtp=d1", "pipeline.layout=uniform"]), vocab_size=257)
    return config, make_plan(config)


def built(config: Config, plan: Plan, pp_rank: int, expert_rank: int) -> tuple[int, int]:
    """Dense and expert parameters of the modules of one rank, on the meta device."""
    units = [name for stage in plan.stages_of(pp_rank) for name in stage.unit_names]
    with torch.device("meta"):
        model = LanguageModel(config, units, expert_rank=expert_rank)
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        counts[".experts." in name] += parameter.numel()
    return counts[0], counts[1]


class TestParameters:
    """The plan counts what ranks build, to the parameter, and all ranks together hold the whole model."""

    @pytest.mark.parametrize("overrides", [(*V3, V), (*V3, *LAST), (*V2_LITE, V), (*V2_LITE, *LAST)])
    def test_of_each_rank(self, overrides: tuple[str, ...]) -> None:
        """First and last expert rank. Rank 0 of V placement holds embedding and head, the last one else a replica."""
        config, plan = planned(*overrides)
        for rank in plan.ranks:
            expected = rank.dense_params, rank.expert_params
            for expert_rank in (0, config.parallel.ep - 1):
                found = built(config, plan, rank.rank, expert_rank)
                assert found == expected, f"rank {rank.rank}, expert rank {expert_rank}: {found}, planned {expected}"
            local = sum(stage["params"] for stage in plan.to_json()["stages"] if stage["rank"] == rank.rank)
            assert local == sum(expected), f"rank {rank.rank}: its stages have {local}, not {sum(expected)}"

    @pytest.mark.parametrize("overrides", [(*V3, V), (*V2_LITE, *LAST)])
    def test_in_fp8(self, overrides: tuple[str, ...]) -> None:
        """Those of the layers that FP8 training attaches itself to."""
        config, plan = planned(*overrides)
        for rank in plan.ranks:
            stages = plan.stages_of(rank.rank)
            with torch.device("meta"):
                model = LanguageModel(config, [name for stage in stages for name in stage.unit_names])
            layers = attach_fp8(model, EmulatedBackend()).layers
            found = sum(p.numel() for name in layers for p in model.get_submodule(name).parameters())
            expected = sum(stage.cost.fp8_params for stage in stages)
            assert found == expected, f"rank {rank.rank}: {found} parameters in FP8, planned {expected}"

    def test_of_all_ranks(self) -> None:
        """671.03e9 of the main model and 11.61e9 of the MTP module, each expert counted on one of its copies."""
        config, plan = planned(*V3, V)
        total = sum(rank.dense_params + config.parallel.ep * rank.expert_params for rank in plan.ranks)
        assert total == 671_026_404_352 + 11_610_067_968, total
        assert total == num_parameters(config), f"{total} != {num_parameters(config)}"
        config, plan = planned(*V2_LITE, V)
        total = sum(rank.dense_params + config.parallel.ep * rank.expert_params for rank in plan.ranks)
        assert total == num_parameters(config), f"{total} != {num_parameters(config)}"


class TestPlaces:
    """Each group of consecutive data ranks holds every expert once, each rank those that its modules are."""

    def test_example(self) -> None:
        """The one of :class:`ExpertPlan`."""
        experts = ExpertPlan(num_experts=8, dp=4, ep=2, within_node=True, all_to_all_bytes=(0,))
        assert [experts.held_by(rank) for rank in range(4)] == [range(4), range(4, 8)] * 2
        assert (experts.groups, experts.per_rank, experts.copies) == ((range(2), range(2, 4)), 4, 2)

    def test_are_those_of_the_modules(self) -> None:
        config, plan = planned(*V2_LITE, V)
        assert plan.experts is not None
        for data_rank in range(8):
            with torch.device("meta"):
                model = LanguageModel(config, ["layers.1.feed_forward"], expert_rank=data_rank % 8)
            held = plan.experts.held_by(data_rank)
            assert model.first_expert == held[0], f"data rank {data_rank}: {model.first_expert} != {held[0]}"
            (shape,) = {p.shape[0] for name, p in model.named_parameters() if ".experts." in name}
            assert shape == len(held), f"data rank {data_rank}: {shape} experts built, {len(held)} planned"

    def test_cover_every_expert_in_every_group(self) -> None:
        _, plan = planned(*V3, V)
        assert plan.experts is not None
        assert (plan.experts.per_rank, plan.experts.copies) == (4, 2)
        assert [(group[0], group[-1]) for group in plan.experts.groups] == [(0, 63), (64, 127)]
        for group in plan.experts.groups:
            held = [expert for rank in group for expert in plan.experts.held_by(rank)]
            assert held == list(range(256)), held

    def test_none_without_expert_parallelism(self) -> None:
        config, plan = planned("model=tiny")
        assert plan.experts is None
        assert place_experts(config, PROFILES["cpu"], []) is None
