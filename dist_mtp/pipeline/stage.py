"""One virtual pipeline stage: a run of units, with the backward split into input and weight gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_mtp.model.loss import HeadStats
from dist_mtp.model.transformer import HEAD, LanguageModel, MicroBatch
from dist_mtp.precision.weight_grads import DeferredGrad, WeightGradQueue, attach_queue, run


class Stage:
    """Runs its units on microbatches and keeps what their backward needs.

    Args:
        index: virtual stage, 0-based.
        model: the rank's units.
        units: names of this stage's units, in order. A stage without any hands hidden states on, and gradients back.
        collect_gradients: called after every action in which autograd leaves gradients on parameters.
    """

    def __init__(
        self, index: int, model: LanguageModel, units: tuple[str, ...], collect_gradients: Callable[[], None]
    ) -> None:
        self.index, self.model, self.units = index, model, units
        self.stats: list[HeadStats] = []
        self._collect_gradients = collect_gradients
        self._queue = WeightGradQueue()
        self._in_flight: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._deferred: dict[int, list[DeferredGrad]] = {}
        for unit in units:
            for module in model.unit_modules(unit):
                attach_queue(module, self._queue)

    def forward(self, microbatch: int, hidden: Tensor | None, batch: MicroBatch) -> Tensor:
        """Run the units on [B, T, D] (None on the first stage); the last stage returns its scalar loss.

        With gradients enabled the graph is kept until :meth:`backward` of the same microbatch.
        """
        training = torch.is_grad_enabled()
        if hidden is not None and training:
            hidden.requires_grad_(True)
        x = hidden
        for unit in self.units:
            if unit != HEAD:
                x = self.model.run_unit(unit, x, batch)
                continue
            assert x is not None
            x, stats = self.model.run_head(x, batch, accumulate_in_forward=training)
            self.stats.append(stats)
        assert x is not None
        if training:
            self._in_flight[microbatch] = (hidden, x)
        return x.detach()

    def backward(self, microbatch: int, grad_output: Tensor | None, *, defer_weights: bool) -> Tensor | None:
        """Input gradient of a microbatch, [B, T, D] (None on the first stage).

        Args:
            grad_output: gradient of the stage's output; None on the last stage, which starts from its loss.
            defer_weights: leave the linears' weight gradients to :meth:`weight_gradients`.
        """
        hidden, output = self._in_flight.pop(microbatch)
        self._queue.deferring = defer_weights
        try:
            torch.autograd.backward(output, grad_output)
        finally:
            self._queue.deferring = False
        if defer_weights:
            self._deferred[microbatch] = self._queue.take()
        self._collect_gradients()
        if hidden is None:
            return None
        grad, hidden.grad = hidden.grad, None
        return grad

    def weight_gradients(self, microbatch: int) -> None:
        """Compute the weight gradients that :meth:`backward` left."""
        run(self._deferred.pop(microbatch))

    def take_stats(self) -> list[HeadStats]:
        """Statistics of the last stage's microbatches since the previous call, in order of execution."""
        stats, self.stats = self.stats, []
        return stats
