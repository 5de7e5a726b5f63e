"""Forward, input gradient and weight gradient of each kind of pipeline unit, timed as a pipeline stage runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

from dist_mtp.bench.model_slice import FoldedDispatcher
from dist_mtp.bench.timing import device_name, interleaved_medians
from dist_mtp.config import Config
from dist_mtp.errors import ConfigError
from dist_mtp.model.attention import AttentionContext
from dist_mtp.model.init import initialize
from dist_mtp.model.moe import attach_dispatcher
from dist_mtp.model.transformer import EMBED, HEAD, LanguageModel, MicroBatch
from dist_mtp.monitor.formatting import compact
from dist_mtp.pipeline.costs import UnitCost, UnitKind, list_units, unit_costs
from dist_mtp.pipeline.devices import PROFILES
from dist_mtp.pipeline.saved import bytes_per_element
from dist_mtp.pipeline.stage import Stage
from dist_mtp.pipeline.unit_times import UnitTimes, decisive_settings
from dist_mtp.precision.fp8.backend import make_backend
from dist_mtp.precision.fp8.layer import attach_fp8

BUDGET_S = 20.0
"""For all units; a round that has begun is finished, and there are some at least."""
_WARM_UP = 3
"""Rounds: kernels are compiled and chosen, allocators fill, FP8 weights are quantised, and gradients exist to be added to."""
_SEED = 1
_MICROBATCH = 0


def measure_unit_times(config: Config, device: torch.device) -> UnitTimes:
    """Times on an otherwise idle device: medians of rounds in which every kind runs F, I and W once.

    With ``parallel.ep`` above 1 a MoE layer has the experts of one rank, which compute as many rows as they would get from
    balanced routers; how rows travel cannot be measured on one device. Weights in FP8 are quantised before the clock starts,
    as training quantises them once per step, not per microbatch.

    Args:
        config: resolved.

    Raises:
        ConfigError: the units would not fit into the device's free memory, or the FP8 backend cannot run on it.
    """
    units = representatives(config)
    check_memory(config, device, _free_bytes(device))
    batch = _random_batch(config, device)
    runs = {kind: UnitRun(config, name, batch, device) for kind, name in units.items()}
    # F, I and W of a kind stand in the order in which they need each other, and a round runs all cases in theirs.
    cases: dict[tuple[UnitKind, str], Callable[[], object]] = {}
    for kind, run in runs.items():
        cases |= {(kind, "f"): run.forward, (kind, "i"): run.input_gradient, (kind, "w"): run.weight_gradient}
    seconds = interleaved_medians(cases, device, budget_s=BUDGET_S, warm_up=_WARM_UP)
    return UnitTimes(
        seconds={kind: (seconds[kind, "f"], seconds[kind, "i"], seconds[kind, "w"]) for kind in runs},
        device=device_name(device),
        device_type=device.type,
        torch=torch.__version__,
        measured_with=decisive_settings(config, device.type),
    )


def representatives(config: Config) -> dict[UnitKind, str]:
    """One unit of each kind: the middle one, as ``precision.fp8_keep_bf16`` rather names first and last layers."""
    names: dict[UnitKind, list[str]] = {}
    for unit in list_units(config):
        names.setdefault(unit.kind, []).append(unit.name)
    return {kind: of_kind[len(of_kind) // 2] for kind, of_kind in names.items()}


class UnitRun:
    """A stage of one unit, and one microbatch that passes it again and again.

    Under bf16 and FP8, weights are bf16 and gradients are summed in fp32, as DeepSpeed's ``BF16_Optimizer`` has them.
    """

    def __init__(self, config: Config, unit: str, batch: MicroBatch, device: torch.device) -> None:
        torch.manual_seed(_SEED)
        with device:
            model = LanguageModel(config, [unit], recompute=config.recompute)
        initialize(model, seed=_SEED, std=config.model.initializer_range)
        if config.parallel.ep > 1:
            attach_dispatcher(model, FoldedDispatcher(config.experts_per_rank))
        precision = config.precision
        if precision.name == "fp8":
            attach_fp8(
                model,
                make_backend(precision.fp8_backend, device),
                keep_bf16=precision.fp8_keep_bf16,
                power_of_two=precision.fp8_power_of_two_scales,
                fp8_dispatch=precision.fp8_dispatch,
            )
        self._mixed_precision = _to_mixed_precision(model) if config.is_mixed_precision else []
        self._stage = Stage(0, model, (unit,), self._collect_gradients)
        self._batch = batch
        shape = (config.train.micro_batch_size, config.train.seq_len, config.model.hidden_size)
        hidden = torch.randn(shape, device=device, dtype=torch.bfloat16 if self._mixed_precision else torch.float32)
        self._hidden: Tensor | None = None if unit == EMBED else hidden
        self._grad: Tensor | None = None if unit == HEAD else torch.randn_like(hidden) / hidden[..., 0].numel()

    def forward(self) -> None:
        """F."""
        self._stage.forward(_MICROBATCH, self._hidden, self._batch)
        self._stage.take_stats()

    def input_gradient(self) -> None:
        """I, after :meth:`forward`."""
        self._stage.backward(_MICROBATCH, self._grad, defer_weights=True)

    def weight_gradient(self) -> None:
        """W, after :meth:`input_gradient`."""
        self._stage.weight_gradients(_MICROBATCH)

    def _collect_gradients(self) -> None:
        """As the engine does after every backward."""
        parameter: Any
        for parameter in self._mixed_precision:
            if parameter.grad is not None:
                parameter.main_grad.add_(parameter.grad)
                parameter.grad = None


def check_memory(config: Config, device: torch.device, free_bytes: float) -> None:
    """Refuse what would not fit: weights, gradients and one microbatch of a unit of each kind.

    Raises:
        ConfigError: names both sizes and what to change.
    """
    of_kind = {kind: _unit_bytes(config, kind, cost, device) for kind, cost in _costs_by_kind(config).items()}
    needed = sum(of_kind.values())
    if needed > free_bytes:
        largest = max(of_kind, key=lambda kind: of_kind[kind])
        raise ConfigError(
            f"measuring one unit of each kind of model={config.model.name} takes about {compact(needed)}B "
            f"({compact(of_kind[largest])}B of them {largest}), but {device.type} has {compact(free_bytes)}B of memory free: "
            "measure on a device that trains this model, or with a larger parallel.ep or smaller train.micro_batch_size"
        )


def _costs_by_kind(config: Config) -> dict[UnitKind, UnitCost]:
    # Only sizes are read, which are those of any profile.
    return {unit.kind: cost for unit, cost in zip(list_units(config), unit_costs(config, PROFILES["cpu"]), strict=True)}


def _unit_bytes(config: Config, kind: UnitKind, cost: UnitCost, device: torch.device) -> float:
    """Bytes of one unit at its largest, from above rather than below."""
    rows, length, model = config.train.micro_batch_size, config.train.seq_len, config.model
    # The head's own copy of the embedding, where MTP needs it.
    replica = model.hidden_size * config.vocab_size if kind == "head" and config.mtp.depth else 0
    # Weight and gradient in fp32, or a bf16 weight, an fp32 gradient, and the weight in FP8 twice.
    weights = 8 * (cost.params + replica)
    # In the backward, gradients of what was kept, or is computed again, come on top.
    total = weights + 2 * (cost.activation_bytes + cost.recompute_bytes) + cost.deferred_bytes
    if kind == "head":
        # A chunk's logits, their probabilities and gradients, and the head's gradient, all fp32.
        total += 3 * 4 * min(config.train.loss_chunk, rows * length) * config.vocab_size
        total += 4 * model.hidden_size * config.vocab_size
    if device.type == "cpu":
        # Without a fused kernel scores are kept, and their softmax, and gradients of both.
        cores = {"attention": 1, "head": config.mtp.depth}.get(kind, 0)
        total += cores * 4 * rows * model.num_attention_heads * length**2 * bytes_per_element(config)
    return float(total)


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def _random_batch(config: Config, device: torch.device) -> MicroBatch:
    """Random ids, each row one document."""
    torch.manual_seed(_SEED)
    rows, length = config.train.micro_batch_size, config.train.seq_len
    ids = torch.randint(config.vocab_size, (rows, config.row_length), device=device)
    documents = torch.zeros_like(ids)
    context = AttentionContext.of(documents[:, :length], config.model)
    return MicroBatch(ids, documents, context, [1 / (rows * length)] * (config.mtp.depth + 1))


def _to_mixed_precision(model: LanguageModel) -> list[Any]:
    """Give the model bf16 weights, fp32 accumulators, and norms an fp32 copy; returns its parameters."""
    parameters: list[Any] = list(model.parameters())
    for parameter in parameters:
        if parameter.dim() == 1:
            parameter.fp32_copy = parameter.detach().clone()
        parameter.data = parameter.data.bfloat16()
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    return parameters
