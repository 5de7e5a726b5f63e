"""Weight gradients that wait for their own action in the pipeline schedule.

Zero-bubble schedules split a backward into the input gradient (I), which the previous stage waits for, and the weight
gradient (W), which nobody waits for and which fills the bubble. Autograd has no such split, so our linears withhold the
weight gradient: their backward returns the input gradient and leaves a closure in the stage's queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dist_mtp.precision.fp8.layer import Fp8Layer

DeferredGrad = Callable[[], None]


class WeightGradQueue:
    """Closures of one pipeline stage that add weight gradients when called.

    While ``deferring`` is false, layers give their weight gradient to autograd as usual.
    """

    def __init__(self) -> None:
        self.deferring = False
        self._pending: list[DeferredGrad] = []

    def put(self, closure: DeferredGrad) -> None:
        self._pending.append(closure)

    def take(self) -> list[DeferredGrad]:
        """Everything queued since the last call: directly after a stage's backward, one microbatch's closures."""
        pending, self._pending = self._pending, []
        return pending


def run(closures: list[DeferredGrad]) -> None:
    """Compute withheld gradients, oldest first, dropping each closure (and its activations) once it ran."""
    # Without no_grad the saved input's grad_fn would be recorded into weight.grad and keep every graph alive.
    with torch.no_grad():
        closures.reverse()
        while closures:
            closures.pop()()


def accumulate(weight: Tensor, grad: Tensor) -> None:
    """Add ``grad`` to ``weight``'s gradient: its fp32 ``main_grad`` where mixed precision keeps one, else ``.grad``."""
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is not None:
        main_grad.add_(grad)
    elif weight.grad is None:
        weight.grad = grad.to(weight.dtype)
    else:
        weight.grad.add_(grad)


def hand_over(weight: Tensor, grad: Tensor) -> Tensor | None:
    """Add ``grad`` to ``weight``'s ``main_grad``, or return it for autograd where there is none; nothing if it is frozen.

    Autograd would first sum several uses within one microbatch, and round each, in the weight's precision.
    """
    if not weight.requires_grad:
        return None
    if getattr(weight, "main_grad", None) is None:
        return grad.to(weight.dtype)
    accumulate(weight, grad)
    return None


class DeferrableLayer(nn.Module):
    """A layer of matrix products, whose weight gradients can be withheld.

    ``weight_grad_queue``: set by the pipeline stage that owns the layer. ``fp8``: set where it multiplies in FP8.
    """

    weight_grad_queue: WeightGradQueue | None = None
    fp8: Fp8Layer | None = None

    def deliver(self, weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
        """Let a weight gradient reach its parameter: later, now, or through autograd.

        Args:
            compute: makes the gradient, in fp32 or the weight's precision.

        Returns:
            What the autograd function's backward hands on for ``weight``.
        """
        if not weight.requires_grad:
            return None
        if self.weight_grad_queue is not None and self.weight_grad_queue.deferring:
            self.weight_grad_queue.put(lambda: accumulate(weight, compute()))
            return None
        return hand_over(weight, compute())


def attach_queue(module: nn.Module, queue: WeightGradQueue) -> None:
    """Make every deferrable layer below ``module`` use ``queue``."""
    for layer in module.modules():
        if isinstance(layer, DeferrableLayer):
            layer.weight_grad_queue = queue
