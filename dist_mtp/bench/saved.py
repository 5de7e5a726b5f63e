"""Bytes that stay from the forward to the backward, measured on layers of the configured sizes.

``dist_mtp.pipeline.saved`` has the formulas.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_mtp.config import Config
from dist_mtp.model.attention import AttentionContext
from dist_mtp.model.init import initialize
from dist_mtp.model.layer import DecoderLayer, attach_recompute
from dist_mtp.precision.fp8.backend import Fp8Backend
from dist_mtp.precision.fp8.layer import attach_fp8
from dist_mtp.precision.recomputation import checkpointed
from dist_mtp.precision.weight_grads import WeightGradQueue, attach_queue
from dist_mtp.recompute import KEEP_ALL, Recompute

HALVES = ("attention", "dense feed-forward", "MoE feed-forward")
_SEED = 1


class Created(TorchDispatchMode):
    """Watches all memory that torch operations take while it is entered, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        # By the address of the storage object, which nothing else gets while there is a weak reference.
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), existed=True)
        results = func(*args, **(kwargs or {}))
        self._note(results, existed=False)
        return results

    def _note(self, tensors: Any, *, existed: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages.setdefault(reference.cdata, (reference, 0 if existed else storage.nbytes()))

    def live_bytes(self, *excluded: Tensor) -> int:
        """Of what was taken and is still there, without the memory of some tensors."""
        gc.collect()
        ignored = {tensor.untyped_storage()._cdata for tensor in excluded}
        return sum(
            size
            for address, (reference, size) in self._storages.items()
            if address not in ignored and not reference.expired()
        )


def saved_bytes(compute: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Memory that ``compute(*inputs)`` leaves behind for its backward, inputs included where they are needed.

    What exists before, as parameters do, does not count, nor does the result. Calls ``compute`` once before, so that what is
    made once for all calls exists.
    """
    with torch.no_grad():
        compute(*inputs)
    with Created() as created:
        result = compute(*(x.detach().requires_grad_().clone() for x in inputs))
    return created.live_bytes(result)


def halves_of(config: Config) -> list[str]:
    """Those of :data:`HALVES` that the trunk has."""
    kinds = {config.model.is_moe_layer(layer) for layer in range(config.model.num_layers)}
    return [half for half, found in zip(HALVES, (True, False in kinds, True in kinds), strict=True) if found]


def half_saved_bytes(
    config: Config,
    half: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    fp8: Fp8Backend | None = None,
    recompute: Recompute = KEEP_ALL,
) -> float:
    """Of one token in one half of a layer, for a microbatch of the configured size. All experts are in the layer.

    Args:
        half: one of :data:`HALVES`.
        fp8: backend of all linear layers and experts; None for products in ``dtype``.
        recompute: what is computed again and so not there.
    """
    _, run = _half_of_a_layer(config, half, device, dtype, fp8, recompute)
    return saved_bytes(run, _random_hidden(config, device, dtype)) / _tokens(config)


def half_deferred_bytes(
    config: Config,
    half: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    fp8: Fp8Backend | None = None,
    recompute: Recompute = KEEP_ALL,
) -> float:
    """As :func:`half_saved_bytes`: what is there between input gradient and weight gradient."""
    layer, run = _half_of_a_layer(config, half, device, dtype, fp8, recompute)
    hidden = _random_hidden(config, device, dtype)
    queue = WeightGradQueue()
    attach_queue(layer, queue)
    run(hidden.clone().requires_grad_()).sum().backward()  # leaves what is made once: gradients, quantised weights
    queue.deferring = True
    with Created() as created:
        x = hidden.clone().requires_grad_()
        run(x).backward(hidden.clone())
        grad = x.grad
        del x
    assert grad is not None
    waiting = queue.take()
    found = created.live_bytes(grad) / _tokens(config)
    del waiting
    return found


def _half_of_a_layer(
    config: Config, half: str, device: torch.device, dtype: torch.dtype, fp8: Fp8Backend | None, recompute: Recompute
) -> tuple[DecoderLayer, Callable[[Tensor], Tensor]]:
    """A layer with one half, and what runs it."""
    layer = DecoderLayer(config, is_moe=half == HALVES[2], attention=half == HALVES[0], feed_forward=half != HALVES[0])
    layer.to(device)
    initialize(layer, seed=_SEED, std=config.model.initializer_range)
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)
    if fp8 is not None:
        attach_fp8(layer, fp8, power_of_two=config.precision.fp8_power_of_two_scales)
    attach_recompute(layer, recompute)
    document = torch.zeros(config.train.micro_batch_size, config.train.seq_len, dtype=torch.int64, device=device)
    context = AttentionContext.of(document, config.model)

    def run(hidden: Tensor) -> Tensor:
        return layer.attention_half(hidden, context) if half == HALVES[0] else layer.feed_forward_half(hidden)

    return layer, (lambda hidden: checkpointed(run, hidden)) if recompute.units else run


def _random_hidden(config: Config, device: torch.device, dtype: torch.dtype) -> Tensor:
    shape = config.train.micro_batch_size, config.train.seq_len, config.model.hidden_size
    generator = torch.Generator(device).manual_seed(_SEED)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _tokens(config: Config) -> int:
    return config.train.micro_batch_size * config.train.seq_len


def with_local_experts(config: Config, max_weights: float) -> Config:
    """The configuration with no more experts than one rank holds, and than ``max_weights`` allow, but enough for a token."""
    model = config.model
    of_one = 3 * model.hidden_size * model.moe_intermediate_size
    num = max(min(config.experts_per_rank, int(max_weights // of_one)), model.num_experts_per_tok)
    if num == model.n_routed_experts or model.n_routed_experts == 0:
        return config
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, n_routed_experts=num, n_group=1, topk_group=1),
        parallel=dataclasses.replace(config.parallel, ep=1),
    )
