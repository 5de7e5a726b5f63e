"""Stages as the runtime uses them, all in one process."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from model.model_cases import batch_of, build, config_of, random_ids, scramble, unit_names
from torch import Tensor

from dist_mtp.pipeline.stage import Stage


def train(counts: Sequence[int], defer_weights: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one microbatch, on stages with so many units."""
    config = config_of(depth=2)
    model, units = build(config), unit_names(config)
    scramble(model)
    batch = batch_of(config, random_ids(config))
    cuts = pairwise(accumulate(counts, initial=0))
    stages = [Stage(i, model, tuple(units[a:b]), lambda: None) for i, (a, b) in enumerate(cuts)]
    hidden: Tensor | None = None
    for stage in stages:
        hidden = stage.forward(0, hidden, batch)
    assert hidden is not None
    grad: Tensor | None = None
    for stage in reversed(stages):
        grad = stage.backward(0, grad, defer_weights=defer_weights)
    assert grad is None, "the first stage returns no gradient"
    if defer_weights:
        for stage in stages:
            stage.weight_gradients(0)
    return hidden, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestEmptyStage:
    """A stage without units changes no bit: it hands the hidden states on, and their gradient back. A breach: a gradient that is
    lost there, or counted twice, where the neighbours are on the same rank and share its tensors."""

    @pytest.mark.parametrize("defer_weights", [False, True], ids=["B", "I and W"])
    @pytest.mark.parametrize("counts", [(3, 0, 2, 3), (1, 0, 0, 7), (7, 0, 1)], ids=str)
    def test_equal_gradients(self, counts: tuple[int, ...], defer_weights: bool) -> None:
        loss, gradients = train(counts, defer_weights)
        expected_loss, expected = train([count for count in counts if count], defer_weights)
        assert torch.equal(loss, expected_loss), f"{loss}, without an empty stage {expected_loss}"
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[name]), name

    def test_evaluation_keeps_nothing(self) -> None:
        config = config_of()
        stage = Stage(1, build(config), (), lambda: None)
        hidden = torch.ones(1, 2, 3)
        with torch.no_grad():
            assert torch.equal(stage.forward(0, hidden, batch_of(config, random_ids(config))), hidden)
        assert not hidden.requires_grad
        with pytest.raises(KeyError):
            stage.backward(0, hidden, defer_weights=False)
