"""Recomputation changes what is kept from forward to backward, and no bit of what comes out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from model.model_cases import batch_of, build, config_of, random_ids, scramble, unit_names
from torch import Tensor

from dist_mtp.config import Config, from_mapping
from dist_mtp.errors import ConfigError
from dist_mtp.model.naming import routers
from dist_mtp.model.transformer import LanguageModel
from dist_mtp.pipeline.stage import Stage
from dist_mtp.precision.fp8.emulated import EmulatedBackend
from dist_mtp.precision.fp8.layer import Fp8Model, attach_fp8
from dist_mtp.recompute import RECOMPUTE_LEVELS, Recompute

KINDS = [*map(str, RECOMPUTE_LEVELS[1:]), "mla_up", "swiglu"]
MODELS: dict[str, dict[str, Any]] = {
    "moe": {},
    "dense": {"n_routed_experts": 0},
    "no_query_latent": {"q_lora_rank": None},
    "without_fused_attention": {"v_head_dim": 12},
    "no_shared_experts": {"n_shared_experts": 0},
}


def model_of(config: Config, recompute: str, precision: str = "fp32") -> tuple[LanguageModel, Fp8Model | None]:
    """The same weights whatever is recomputed, as in a run with main gradients in mixed precision."""
    model = build(config, recompute=Recompute.parse(recompute))
    scramble(model)
    if precision == "fp32":
        return model, None
    parameter: Any
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
        parameter.main_grad = torch.zeros(parameter.shape)
    return model, attach_fp8(model, EmulatedBackend()) if precision == "fp8" else None


def train(model: LanguageModel, config: Config, *, defer: bool) -> tuple[dict[str, Tensor], list[float]]:
    """Two microbatches of one stage, both in flight at a time; every gradient and all losses."""
    stage = Stage(0, model, tuple(unit_names(config)), lambda: None)
    batches = [batch_of(config, random_ids(config, seed=seed)) for seed in (1, 2)]
    losses = [float(stage.forward(index, None, batch)) for index, batch in enumerate(batches)]
    for index in range(len(batches)):
        stage.backward(index, None, defer_weights=defer)
    for index in range(len(batches) if defer else 0):
        stage.weight_gradients(index)
    found = {name: getattr(p, "main_grad", p.grad) for name, p in model.named_parameters()}
    assert not [name for name, grad in found.items() if grad is None]
    return found, losses


def assert_same(found: tuple[dict[str, Tensor], list[float]], expected: tuple[dict[str, Tensor], list[float]]) -> None:
    assert found[1] == expected[1], f"losses {found[1]} != {expected[1]}"
    different = [name for name, grad in expected[0].items() if not torch.equal(found[0][name], grad)]
    assert not different, f"other gradients: {different}"


class TestGradients:
    """Losses and all gradients are equal bit for bit, as the same operations are repeated on the same numbers."""

    @pytest.mark.parametrize("defer", [True, False], ids=["deferred", "full_backward"])
    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_precisions(self, kind: str, precision: str, defer: bool) -> None:
        config = config_of(depth=2, v_head_dim=24)
        expected = train(model_of(config, "none", precision)[0], config, defer=defer)
        assert_same(train(model_of(config, kind, precision)[0], config, defer=defer), expected)

    @pytest.mark.parametrize("kind", ["norms+mla_up+swiglu", "full"])
    @pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS.keys())
    @pytest.mark.parametrize("mtp", [{"hidden": "pre_norm"}, {"share_depths": True}], ids=["pre_norm", "shared"])
    def test_models(self, sizes: dict[str, Any], mtp: dict[str, Any], kind: str) -> None:
        config = config_of(depth=2, mtp=mtp, **{"v_head_dim": 24, **sizes})
        expected = train(model_of(config, "none")[0], config, defer=True)
        assert_same(train(model_of(config, kind)[0], config, defer=True), expected)


class TestCountedOnce:
    """What the forward reports beside its output does not count what is computed again."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_router(self, kind: str) -> None:
        config = config_of(depth=1, v_head_dim=24)
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, z_loss_coeff=0.1))
        states = []
        for recompute in ("none", kind):
            model, _ = model_of(config, recompute)
            train(model, config, defer=True)
            experts = [m.mlp.experts.processed for m in model.model.layers.values() if hasattr(m.mlp, "experts")]
            states.append([*experts, *(t for _, router in routers(model) for t in (router.load, router.aux_means))])
        slots = 2 * 2 * config.train.seq_len * config.model.num_experts_per_tok
        assert int(states[0][0].sum()) == slots
        for found, expected in zip(states[1], states[0], strict=True):
            assert torch.equal(found, expected), f"{found} != {expected}"

    @pytest.mark.parametrize("kind", KINDS)
    def test_fp8_statistics(self, kind: str) -> None:
        config = config_of(depth=1, v_head_dim=24)
        found = []
        for recompute in ("none", kind):
            model, fp8 = model_of(config, recompute, "fp8")
            assert fp8 is not None
            fp8.measure()
            train(model, config, defer=True)
            found.append(fp8.statistics.take())
        assert found[1] == found[0], f"{found[1]} != {found[0]}"


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_records_nothing(kind: str) -> None:
    config = config_of(depth=1)
    model, _ = model_of(config, kind)
    with torch.no_grad():
        loss = Stage(0, model.eval(), tuple(unit_names(config)), lambda: None).forward(
            0, None, batch_of(config, random_ids(config))
        )
    assert loss.grad_fn is None


class TestConfiguration:
    """Values are read in any order and written in one; what cannot work is refused with the fix."""

    def test_names(self) -> None:
        assert str(Recompute.parse("swiglu+norms")) == "norms+swiglu"
        assert [str(level) for level in RECOMPUTE_LEVELS][::4] == ["none", "full"]
        assert from_mapping({"pipeline": {"recompute": "mla_up"}}).recompute == Recompute(mla_up=True)

    @pytest.mark.parametrize("value", ["all", "norms+norms", "norms+", "full+norms", ""])
    def test_refused(self, value: str) -> None:
        with pytest.raises(ConfigError, match=r"pipeline\.recompute"):
            from_mapping({"pipeline": {"recompute": value}})

    def test_deepep(self) -> None:
        values: dict[str, Any] = {
            "moe": {"dispatcher": "deepep"},
            "precision": {"name": "bf16"},
            "device": "cuda",
            "pipeline": {"recompute": "norms+mla_up+swiglu"},
        }
        assert from_mapping(values).recompute.swiglu
        with pytest.raises(ConfigError, match=r"recompute=full .*alltoall"):
            from_mapping({**values, "pipeline": {"recompute": "full"}})
