"""Parameters and FLOPs against published numbers and against counts done by hand."""

from __future__ import annotations

import dataclasses

import pytest
from pipeline.pipeline_cases import DEEPSEEK_V3, tiny_config, v3_config

from dist_mtp.config import Config, ModelConfig, MtpConfig, ParallelConfig, PrecisionConfig, TrainConfig
from dist_mtp.errors import ConfigError
from dist_mtp.pipeline import sizes
from dist_mtp.pipeline.costs import (
    flops_per_token,
    list_units,
    num_parameters,
    total_cost,
    unit_costs,
    unit_parameters,
)
from dist_mtp.pipeline.devices import PROFILES, resolve_profile
from dist_mtp.recompute import RECOMPUTE_LEVELS, Recompute


class TestDeepSeekV3:
    """The real model's figures follow from its configuration."""

    def test_parameters(self) -> None:
        """671.03e9 without MTP: the sum over the tensors of the published checkpoint."""
        params = num_parameters(v3_config(depth=0))
        assert params == 671_026_404_352, f"{params} != 671026404352"

    def test_mtp_module_parameters(self) -> None:
        """About 11.6e9 per module, embedding and head not counted."""
        params = num_parameters(v3_config(depth=1)) - num_parameters(v3_config(depth=0))
        assert params == 11_610_067_968, params

    @pytest.mark.parametrize(("depth", "expected"), [(0, 250.4e9), (1, 260.6e9), (2, 270.8e9), (3, 281.0e9)])
    def test_flops_per_token(self, depth: int, expected: float) -> None:
        """Agrees with NVIDIA's published pairs of tokens/s and TFLOP/s within 0.5 %."""
        flops = flops_per_token(v3_config(depth=depth))
        assert flops == pytest.approx(expected, rel=0.005), f"{flops:.4g} != {expected:.4g}"


def hand_made_config(**mtp: object) -> Config:
    """One dense and one MoE layer with sizes that are all different primes where possible."""
    model = ModelConfig(
        vocab_size=101,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=2,
        q_lora_rank=5,
        kv_lora_rank=3,
        qk_nope_head_dim=7,
        qk_rope_head_dim=2,
        v_head_dim=11,
        intermediate_size=13,
        n_routed_experts=4,
        n_shared_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=17,
    )
    train = TrainConfig(seq_len=16, micro_batch_size=3)
    return Config(model=model, mtp=MtpConfig(**mtp), train=train)  # type: ignore[arg-type]


ATTENTION = 8 + 5 * 8 + 5 + 2 * 9 * 5 + (3 + 2) * 8 + 3 + 2 * (7 + 11) * 3 + 8 * 2 * 11
"""input_layernorm, q_a, its norm, q_b, kv_a, its norm, kv_b, o of :func:`hand_made_config`."""
DENSE = 8 + 3 * 8 * 13
MOE = 8 + 4 * 8 + 4 * 3 * 8 * 17 + 3 * 8 * (17 * 2)


class TestParameters:
    """Each unit owns exactly the parameters of its modules."""

    def test_units(self) -> None:
        config = hand_made_config(depth=2)
        mtp = 8 + 8 + 2 * 8 * 8 + ATTENTION + MOE + 8
        expected = [101 * 8, ATTENTION, DENSE, ATTENTION, MOE, 8 + 101 * 8 + 2 * mtp]
        found = [cost.params for cost in unit_costs(config, PROFILES["cpu"])]
        assert found == expected, f"{found} != {expected}"

    def test_variants(self) -> None:
        """Tied heads, shared depths, dense MTP blocks and uncompressed queries change what they should."""
        base = num_parameters(hand_made_config(depth=2))
        one = num_parameters(hand_made_config(depth=1))
        assert num_parameters(hand_made_config(depth=2, share_depths=True)) == one
        assert base - num_parameters(hand_made_config(depth=2, block="dense")) == 2 * (MOE - DENSE)
        config = hand_made_config(depth=2)
        tied = dataclasses.replace(config, model=dataclasses.replace(config.model, tie_word_embeddings=True))
        assert base - num_parameters(tied) == 101 * 8
        plain = dataclasses.replace(config, model=dataclasses.replace(config.model, q_lora_rank=None))
        difference = sizes.attention_half(config).params - sizes.attention_half(plain).params
        assert difference == (5 * 8 + 5 + 18 * 5) - 18 * 8, difference


class TestTimes:
    """Seconds follow from FLOPs: a linear layer's I and W cost its F, attention's core has twice the I and no W."""

    def test_forward_counts_two_flops_per_weight_and_token(self) -> None:
        """Attention: 2 per weight + T/2 positions * 2 * heads * (qk + v); dense: 2 per weight."""
        config = hand_made_config(depth=0)
        norms = 8 + 5 + 3
        tokens, speed = 3 * 16, PROFILES["cpu"].flops_per_s
        attention, dense = unit_costs(config, PROFILES["cpu"])[1:3]
        weights, core = 2 * (ATTENTION - norms), 16 * 2 * (9 + 11)
        assert attention.time_f == pytest.approx((weights + core) * tokens / speed)
        assert attention.time_i == pytest.approx((weights + 2 * core) * tokens / speed)
        assert attention.time_w == pytest.approx(weights * tokens / speed)
        assert dense.time_f == dense.time_i == dense.time_w == pytest.approx(2 * (DENSE - 8) * tokens / speed)

    def test_head_computes_its_gradients_in_the_forward(self) -> None:
        """Without MTP the head has three products in F and nothing in I and W; MTP blocks are ordinary."""
        tokens, speed = 3 * 16, PROFILES["cpu"].flops_per_s
        plain = unit_costs(hand_made_config(depth=0), PROFILES["cpu"])[-1]
        assert plain.time_f == pytest.approx(3 * 2 * 8 * 101 * tokens / speed)
        assert (plain.time_i, plain.time_w) == (0, 0)
        deep = unit_costs(hand_made_config(depth=2), PROFILES["cpu"])[-1]
        module = sizes.mtp_module(hand_made_config(depth=2))
        assert deep.time_w == pytest.approx(2 * module.weight_flops * tokens / speed)
        shared = unit_costs(hand_made_config(depth=2, share_depths=True), PROFILES["cpu"])[-1]
        assert shared.time == pytest.approx(deep.time), "a shared module is computed at every depth"

    def test_times_add_up_to_model_flops(self) -> None:
        """F + I + W over all units but the lookup is ``flops_per_token``."""
        config = v3_config()
        total = total_cost(unit_costs(config, PROFILES["h100"])[1:]).time * PROFILES["h100"].flops_per_s / 4096
        assert total == pytest.approx(flops_per_token(config)), f"{total} != {flops_per_token(config)}"

    def test_linear_layers_in_fp8(self) -> None:
        """They multiply at the speed of FP8; attention's core, routers and losses at that of bf16."""
        config = dataclasses.replace(v3_config(), precision=PrecisionConfig(name="fp8"))
        profile = dataclasses.replace(PROFILES["h100"], flops_per_s=6e14, fp8_flops_per_s=11e14)
        attention = 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 512 * 32768 + 16384 * 7168
        experts, joint, router, dense = 9 * 3 * 7168 * 2048, 2 * 7168**2, 256 * 7168, 3 * 7168 * 18432
        # Per token: weights in FP8, weights in bf16, FLOPs of attention's core, FLOPs of the losses.
        core, losses = 4096 * 128 * (192 + 128), 2 * 2 * 7168 * 129280
        work = {
            "attention": (attention, 0, core, 0),
            "dense_ffn": (dense, 0, 0, 0),
            "moe_ffn": (experts, router, 0, 0),
            "head": (attention + experts + joint, router, core, losses),
        }
        for unit, cost in list(zip(list_units(config), unit_costs(config, profile), strict=True))[1:]:
            in_fp8, in_bf16, of_core, of_losses = work[unit.kind]
            weights = 4096 * 2 * (in_fp8 / 11e14 + in_bf16 / 6e14)
            expected = (
                weights + 4096 * (of_core + 3 * of_losses) / 6e14,
                weights + 4096 * 2 * of_core / 6e14,
                weights,
            )
            found = (cost.time_f, cost.time_i, cost.time_w)
            assert found == pytest.approx(expected), f"{unit.name}: {found} != {expected}"

    def test_activations_grow_with_the_microbatch(self) -> None:
        config = tiny_config()
        double = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=8))
        for one, two in zip(unit_costs(config, PROFILES["cpu"]), unit_costs(double, PROFILES["cpu"]), strict=True):
            assert two.activation_bytes == 2 * one.activation_bytes > 0


def expert_parallel(config: Config, ep: int, dp: int = 4, pp: int = 2) -> Config:
    return dataclasses.replace(config, parallel=ParallelConfig(pp=pp, dp=dp, ep=ep))


class TestRecompute:
    """Memory is bought with time in the input gradient, and with nothing else; model FLOPs stay what they are."""

    def test_times(self) -> None:
        """DeepSeek-V3's up-projections are 1536 x 24576 and 512 x 32768; whole units take their forward, but never the loss."""
        config, profile = expert_parallel(v3_config(depth=2), ep=64, dp=128), PROFILES["h800"]
        plain = unit_costs(config, profile)
        up = 2 * (1536 * 24576 + 512 * 32768) * 4096 / profile.flops_per_s
        ups = {"attention": 1, "head": 2}
        losses = 3 * 2 * 3 * 7168 * 129280 * 4096 / profile.flops_per_s
        for level in RECOMPUTE_LEVELS:
            for unit, before, after in zip(list_units(config), plain, unit_costs(config, profile, level), strict=True):
                expected = ups.get(unit.kind, 0) * up if level.mla_up else 0.0
                if level.units and unit.kind != "embedding":
                    expected = before.time_f - (losses if unit.kind == "head" else 0)
                assert after.time_i - before.time_i == pytest.approx(expected, rel=1e-9, abs=1e-12), f"{level}, {unit}"
                assert (after.time_f, after.time_w) == (before.time_f, before.time_w), f"{level}, {unit}"
                exchanges = 3 / 2 if level.units else 1
                assert after.all_to_all_bytes == exchanges * before.all_to_all_bytes, f"{level}, {unit}"

    def test_each_level_keeps_less(self) -> None:
        config = v3_config(depth=2)
        kept = [total_cost(unit_costs(config, PROFILES["h800"], level)) for level in RECOMPUTE_LEVELS]
        sizes_of_levels = [cost.activation_bytes for cost in kept]
        assert sizes_of_levels == sorted(set(sizes_of_levels), reverse=True), sizes_of_levels
        assert len({cost.deferred_bytes for cost in kept}) == 1, kept
        assert kept[0].recompute_bytes == 0, kept[0]

    def test_whole_units_come_back_one_at_a_time(self) -> None:
        """Of the head one module of two: so the unit that makes the most again is one of the trunk's layers."""
        config, full = v3_config(depth=2), Recompute(units=True)
        plain, kept = unit_costs(config, PROFILES["h800"]), unit_costs(config, PROFILES["h800"], full)
        for before, after in list(zip(plain, kept, strict=True))[1:-1]:
            assert after.recompute_bytes == before.activation_bytes - after.activation_bytes, after
        made = (plain[-1].activation_bytes - kept[-1].activation_bytes) // 2
        assert kept[-1].recompute_bytes == made, f"{kept[-1].recompute_bytes} != {made}"
        assert total_cost(kept).recompute_bytes == max(cost.recompute_bytes for cost in kept)

    def test_the_key_decides_unless_told(self) -> None:
        config = v3_config(depth=1)
        config = dataclasses.replace(config, pipeline=dataclasses.replace(config.pipeline, recompute="norms+mla_up"))
        profile = PROFILES["h800"]
        assert unit_costs(config, profile) == unit_costs(config, profile, Recompute(norms=True, mla_up=True))
        assert unit_costs(config, profile) != unit_costs(config, profile, Recompute())
        assert flops_per_token(config) == flops_per_token(v3_config(depth=1))


class TestExpertParallelism:
    """A rank holds E / ep experts, and sends K hidden states per token out and back, (ep - 1) / ep of them elsewhere."""

    def test_parameters(self) -> None:
        """Only routed experts are divided; the whole model's counts stay."""
        config = hand_made_config(depth=2)
        local = MOE - 4 * 3 * 8 * 17 + 2 * 3 * 8 * 17
        mtp = 8 + 8 + 2 * 8 * 8 + ATTENTION + local + 8
        costs = unit_costs(expert_parallel(config, ep=2), PROFILES["cpu"])
        expected = [101 * 8, ATTENTION, DENSE, ATTENTION, local, 8 + 101 * 8 + 2 * mtp]
        assert [cost.params for cost in costs] == expected, f"{[cost.params for cost in costs]} != {expected}"
        experts = [0, 0, 0, 0, 2 * 3 * 8 * 17, 2 * 2 * 3 * 8 * 17]
        assert [cost.expert_params for cost in costs] == experts, (
            f"{[cost.expert_params for cost in costs]} != {experts}"
        )
        whole = unit_parameters(expert_parallel(config, ep=2))
        assert whole == tuple(cost.params for cost in unit_costs(config, PROFILES["cpu"])), whole

    @pytest.mark.parametrize(("precision", "element_bytes"), [("fp32", 4), ("bf16", 2)])
    def test_all_to_all_bytes(self, precision: str, element_bytes: int) -> None:
        """3 rows of 16 tokens, K = 2, H = 8: dispatch, combine and their backwards; the head has one layer per depth."""
        config = hand_made_config(depth=2)
        config = dataclasses.replace(config, precision=PrecisionConfig(name=precision))  # type: ignore[arg-type]
        exchange = 3 * 16 * 2 * 8 * element_bytes
        for ep, share in ((1, 0), (2, 1 / 2), (4, 3 / 4)):
            found = [c.all_to_all_bytes for c in unit_costs(expert_parallel(config, ep=ep), PROFILES["cpu"])]
            expected = [0, 0, 0, 0, 4 * exchange * share, 2 * 4 * exchange * share]
            assert found == expected, f"ep={ep}: {found} != {expected}"

    def test_dispatch_in_fp8(self) -> None:
        """Towards experts, in F and I once each, a row is 7168 values and 56 exponents of a byte; back it is bf16."""
        config = expert_parallel(v3_config(depth=2), ep=64, dp=128)
        config = dataclasses.replace(config, precision=PrecisionConfig(name="fp8", fp8_dispatch=True))
        towards, back = (4096 * 8 * width * 63 // 64 for width in (7168 + 56, 2 * 7168))
        narrow, wide = (
            unit_costs(
                dataclasses.replace(config, precision=PrecisionConfig(name="fp8", fp8_dispatch=fp8)), PROFILES["h800"]
            )
            for fp8 in (True, False)
        )
        for unit, after, before in zip(list_units(config), narrow, wide, strict=True):
            layers = {"moe_ffn": 1, "head": 2}.get(unit.kind, 0)
            expected = 2 * layers * (towards + back)
            assert after.all_to_all_bytes == expected, f"{unit.name}: {after.all_to_all_bytes} != {expected}"
            saved = layers * (back - towards) / 4.5e10
            for kind in ("time_f", "time_i"):
                found = getattr(before, kind) - getattr(after, kind)
                assert found == pytest.approx(saved, abs=1e-12), f"{unit.name}, {kind}: {found} != {saved}"

    @pytest.mark.parametrize(
        ("mtp", "head_layers"),
        [
            ({"depth": 0}, 0),
            ({"depth": 2}, 2),
            ({"depth": 2, "share_depths": True}, 2),
            ({"depth": 2, "block": "dense"}, 0),
        ],
    )
    def test_head_exchanges_once_per_moe_depth(self, mtp: dict[str, object], head_layers: int) -> None:
        """A shared module is computed at every depth, so its tokens travel at every depth."""
        costs = unit_costs(expert_parallel(hand_made_config(**mtp), ep=2), PROFILES["cpu"])
        expected = head_layers * costs[-2].all_to_all_bytes
        assert costs[-2].all_to_all_bytes > 0
        assert costs[-1].all_to_all_bytes == expected, f"{costs[-1].all_to_all_bytes} != {expected}"

    @pytest.mark.parametrize(("ep", "within"), [(8, True), (64, False)])
    def test_times(self, ep: int, within: bool) -> None:
        """Two exchanges in F and two in I of each MoE layer, none in W: over NVLink in a node of 8, else over the network."""
        profile = PROFILES["h800"]
        alone = unit_costs(expert_parallel(v3_config(depth=2), ep=1, dp=128), profile)
        shared = unit_costs(expert_parallel(v3_config(depth=2), ep=ep, dp=128), profile)
        sent = 4096 * 8 * 7168 * 2 * (ep - 1) / ep
        exchange = 1.5e-5 + sent / (1.6e11 if within else 4.5e10)
        layers = {"moe_ffn": 1, "head": 2}
        for unit, before, after in zip(list_units(v3_config(depth=2)), alone, shared, strict=True):
            expected = 2 * layers.get(unit.kind, 0) * exchange
            for kind in ("time_f", "time_i"):
                found = getattr(after, kind) - getattr(before, kind)
                assert found == pytest.approx(expected, abs=1e-12), f"{unit.name}, {kind}: {found} != {expected}"
            assert after.time_w == before.time_w, unit.name

    @pytest.mark.parametrize(
        ("profile", "ep", "world_size", "within"),
        [
            ("h100", 2, 64, True),
            ("h100", 8, 64, True),
            ("h100", 16, 64, False),
            ("h100", 16, 16, False),
            ("h100", 3, 6, True),
            ("h100", 3, 12, False),
            ("cpu", 16, 64, True),
        ],
    )
    def test_groups_within_a_node(self, profile: str, ep: int, world_size: int, within: bool) -> None:
        """Ranks 0-7, 8-15, ... share a node of GPUs; groups of 3 cross them unless there is one node only."""
        nodes = PROFILES[profile].node_ranks or world_size
        groups = [range(first, first + ep) for first in range(0, world_size - ep + 1, ep)]
        assert all(group[0] // nodes == group[-1] // nodes for group in groups) == within, "the case itself is wrong"
        assert PROFILES[profile].within_node(ep, world_size) == within


def test_unit_list() -> None:
    """Embedding, two halves per layer, head; kinds follow ``first_k_dense_replace``."""
    units = list_units(Config(model=dataclasses.replace(DEEPSEEK_V3, num_layers=4)))
    assert [unit.name for unit in units[:4]] == [
        "embed",
        "layers.0.attention",
        "layers.0.feed_forward",
        "layers.1.attention",
    ]
    assert [unit.kind for unit in units[2:-1:2]] == ["dense_ffn", "dense_ffn", "dense_ffn", "moe_ffn"]
    assert (units[-1].name, units[-1].kind, units[-2].layer) == ("head", "head", 3)


@pytest.mark.parametrize(
    ("name", "cuda", "expected"),
    [
        ("auto", None, "cpu"),
        ("auto", "NVIDIA H100 80GB HBM3", "h100"),
        ("auto", "NVIDIA H800", "h800"),
        ("auto", "NVIDIA H200", "h200"),
        ("auto", "NVIDIA A100-SXM4-80GB", "a100"),
        ("auto", "NVIDIA GeForce RTX 4090", "a100"),
        ("cpu", "NVIDIA H100 80GB HBM3", "cpu"),
    ],
)
def test_device_profiles(name: str, cuda: str | None, expected: str) -> None:
    assert resolve_profile(name, cuda).name == expected


def test_unknown_profile() -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.device_profile=tpu is unknown: use auto or one of h100"):
        resolve_profile("tpu")
