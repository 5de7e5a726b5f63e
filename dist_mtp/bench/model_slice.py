"""What one of many GPUs computes in training, on a GPU alone: a few layers, MTP modules and the head, in bf16 or FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_mtp.config import Config
from dist_mtp.model.attention import AttentionContext
from dist_mtp.model.dispatch import Dispatch, LocalDispatcher, Routing
from dist_mtp.model.init import initialize
from dist_mtp.model.moe import attach_dispatcher
from dist_mtp.model.transformer import LanguageModel, MicroBatch
from dist_mtp.pipeline.costs import list_units
from dist_mtp.precision.fp8.backend import Fp8Backend
from dist_mtp.precision.fp8.layer import attach_fp8
from dist_mtp.precision.weight_grads import DeferrableLayer

_SEED = 1


class FoldedDispatcher:
    """Expert e of all stands for expert e modulo n of the n that are here: those get as many rows as n balanced ones would."""

    def __init__(self, num_local: int) -> None:
        self.num_local = num_local

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatch:
        counts_E = routing.counts_E.view(-1, self.num_local).sum(dim=0)
        folded = Routing(routing.ids_TK % self.num_local, routing.weights_TK, counts_E)
        return LocalDispatcher().dispatch(x_TD, folded)


class ModelSlice:
    """All units of a configuration with the experts of one rank, and one random microbatch.

    Weights are bf16, gradients are summed in fp32, as training does. Nothing travels and nothing is updated.
    """

    def __init__(self, config: Config, backend: Fp8Backend, device: torch.device) -> None:
        torch.manual_seed(_SEED)
        self.units = [unit.name for unit in list_units(config)]
        rows, length = config.train.micro_batch_size, config.train.seq_len
        self.tokens = rows * length
        with device:
            self.model = LanguageModel(config, self.units, recompute=config.recompute)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16()
        initialize(self.model, seed=_SEED, std=config.model.initializer_range)
        self._attach_main_grads()
        attach_dispatcher(self.model, FoldedDispatcher(config.experts_per_rank))
        self._fp8 = attach_fp8(self.model, backend, power_of_two=config.precision.fp8_power_of_two_scales)
        ids = torch.randint(config.vocab_size, (rows, config.row_length), device=device)
        documents = torch.zeros_like(ids)
        context = AttentionContext.of(documents[:, :length], config.model)
        self._batch = MicroBatch(ids, documents, context, [1 / self.tokens] * (config.mtp.depth + 1))
        hidden = torch.randn(rows, length, config.model.hidden_size, device=device).bfloat16()
        self._hidden, self._grad = hidden.requires_grad_(), torch.randn_like(hidden) / self.tokens

    def step(self, precision: str, micro_batches: int, *, whole: bool) -> None:
        """Forward and backward of a step's microbatches: of everything, or of the trunk's layers alone.

        Weights are quantised anew, as after an update.
        """
        self._use(precision)
        self._fp8.forget_weights()
        for _ in range(micro_batches):
            if whole:
                self._loss().backward()
            else:
                self._layers(self._hidden).backward(self._grad)

    def microbatch_bytes(self, precision: str) -> dict[str, int]:
        """GPU memory of one microbatch beside weights and gradients: ``kept`` when its forward is done, and at ``peak``."""
        device = self._hidden.device
        self.step(precision, 1, whole=True)  # leaves the quantised weights
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        loss = self._loss()
        kept = torch.cuda.memory_allocated(device) - before
        loss.backward()
        return {"kept": kept, "peak": torch.cuda.max_memory_allocated(device) - before}

    def _use(self, precision: str) -> None:
        for name, in_fp8 in self._fp8.layers.items():
            layer = self.model.get_submodule(name)
            assert isinstance(layer, DeferrableLayer)
            layer.fp8 = in_fp8 if precision == "fp8" else None

    def _loss(self) -> Tensor:
        embedded = self.model.run_unit(self.units[0], None, self._batch)
        loss, _ = self.model.run_head(self._layers(embedded), self._batch, accumulate_in_forward=True)
        return loss

    def _layers(self, hidden: Tensor) -> Tensor:
        for unit in self.units[1:-1]:
            hidden = self.model.run_unit(unit, hidden, self._batch)
        return hidden

    def _attach_main_grads(self) -> None:
        """What DeepSpeed's ``BF16_Optimizer`` keeps for each parameter."""
        parameter: Any
        for parameter in self.model.parameters():
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
