"""Loads of a step and what they do to the biases, in a world of one rank."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model.model_cases import batch_of, build, config_of, gradients, random_ids
from torch import Tensor

from dist_mtp.config import Config, MoeConfig
from dist_mtp.model.dispatch import Dispatch, LocalDispatcher, Routing
from dist_mtp.model.moe import attach_dispatcher
from dist_mtp.model.naming import routers
from dist_mtp.model.transformer import LanguageModel
from dist_mtp.parallel.balance import ExpertLoads, gather_loads, move_router_biases

pytestmark = pytest.mark.usefixtures("world_of_one")
MESH: Any = SimpleNamespace(dp=1, device=torch.device("cpu"))
LAYERS = (1, 2, 3)
"""Two trunk layers and one MTP module."""


def one_microbatch(depth: int = 1, **mtp: Any) -> Config:
    """All auxiliary losses on, and a global batch of one microbatch with two rows."""
    config = config_of(depth, mtp=mtp)
    train = dataclasses.replace(config.train, micro_batch_size=2, micro_batches=1)
    moe = MoeConfig(seq_aux_loss_coeff=0.1, global_aux_loss_coeff=0.1, z_loss_coeff=0.1)
    return dataclasses.replace(config, train=train, moe=moe)


def trained_once(config: Config, dispatcher: Any = None) -> LanguageModel:
    """A model after one forward and backward of the global batch."""
    model = build(config)
    attach_dispatcher(model, dispatcher or LocalDispatcher())
    gradients(model, batch_of(config, random_ids(config)))
    return model


class TestLoads:
    """Every routed row is counted where it is sent and where it is computed, and the two are compared expert by expert."""

    def test_counts(self) -> None:
        config = one_microbatch()
        model = trained_once(config)
        expected = [router.load.tolist() for _, router in routers(model)]
        loads = gather_loads(model, config, MESH)
        assert loads.layers == LAYERS
        assert loads.load_LE.tolist() == expected, f"{loads.load_LE} != {expected}"
        assert loads.load_LE.sum(dim=1).tolist() == [2 * 12 * 3] * 3, "rows x positions x choices"
        assert loads.dropped_share == 0
        again = [router.load.sum().item() for _, router in routers(model)]
        assert again == [0, 0, 0], f"{again}: the next step counts anew"

    @pytest.mark.parametrize("kept", [slice(1, None), slice(None, -1)], ids=["first_row_lost", "last_row_lost"])
    def test_lost_row(self, kept: slice) -> None:
        class Lossy(LocalDispatcher):
            def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatch:
                return LossyDispatch(super().dispatch(x_TD, routing), kept)

        config = one_microbatch()
        with pytest.raises(
            RuntimeError, match=r"layer 1: expert \d was sent \d+ rows and computed \d+: moe.dispatcher"
        ):
            gather_loads(trained_once(config, Lossy()), config, MESH)

    def test_row_of_another_expert(self) -> None:
        """The totals agree, the experts' do not."""
        config = one_microbatch()
        model = trained_once(config)
        experts = model.model.layers["2"].mlp.experts
        experts.processed[5] += 1
        experts.processed[6] -= 1
        sent = int(model.model.layers["2"].mlp.gate.load[5])
        with pytest.raises(RuntimeError, match=f"layer 2: expert 5 was sent {sent} rows and computed {sent + 1}"):
            gather_loads(model, config, MESH)

    @pytest.mark.parametrize("share", [False, True])
    def test_auxiliary_losses_are_means(self, share: bool) -> None:
        """Of equal previous loads the global loss is exactly 1, also for a module that runs once for each of three depths."""
        config = one_microbatch(depth=3, share_depths=share)
        aux_losses = gather_loads(trained_once(config), config, MESH).aux_losses
        assert aux_losses["global_aux"] == pytest.approx(1, abs=1e-6), aux_losses
        assert 1 <= aux_losses["seq_aux"] < 3, aux_losses


class LossyDispatch:
    """Loses rows on the way to the experts; what it brings back is not looked at."""

    def __init__(self, whole: Dispatch, kept: slice) -> None:
        self.whole, self.kept = whole, kept

    def receive(self) -> tuple[Tensor, Tensor]:
        rows, ends_E = self.whole.receive()
        return rows[self.kept], (ends_E - 1).clamp_min(0)

    def combine(self, rows_ND: Tensor) -> Tensor:
        return self.whole.combine(torch.cat((rows_ND, rows_ND[:1])))


class TestBiases:
    """Overloaded experts become less likely to be chosen, the others more, by exactly gamma."""

    def test_direction(self) -> None:
        model = build(one_microbatch())
        load_E = torch.tensor([9.0, 1, 4, 4, 0, 6, 4, 4], dtype=torch.float64)  # mean 4
        loads = ExpertLoads(LAYERS, load_E.expand(3, -1), 0.0, {})
        square_sum = move_router_biases(model, loads, speed=0.25)
        expected = [-0.25, 0.25, 0, 0, 0.25, -0.25, 0, 0]
        for name, router in routers(model):
            assert router.e_score_correction_bias.tolist() == expected, f"{name}: {router.e_score_correction_bias}"
            assert router.load_share.tolist() == (load_E / 4).tolist(), f"{name}: {router.load_share}"
        assert square_sum == 3 * 4 * 0.25**2

    def test_frozen(self) -> None:
        model = build(one_microbatch())
        loads = ExpertLoads(LAYERS, torch.arange(8.0).double().expand(3, -1), 0.0, {})
        assert move_router_biases(model, loads, speed=0.0) == 0
        assert not any(router.e_score_correction_bias.any() for _, router in routers(model))


def test_speed_changes_with_tokens() -> None:
    moe = MoeConfig(bias_update_speed=0.5, bias_update_speed_steps=((100, 0.25), (200, 0)))
    found = [moe.bias_update_speed_at(tokens) for tokens in (0, 99, 100, 199, 200, 10**15)]
    assert found == [0.5, 0.5, 0.25, 0.25, 0, 0], found
