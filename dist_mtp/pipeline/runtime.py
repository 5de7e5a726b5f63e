"""Executes a lowered action table on one rank.

The table alone decides the order of computation and communication; this file only says what each action does. Hidden
states and their gradients are the only tensors that travel: token ids reach every stage from the rank's own data.

Why not ``torch.distributed.pipelining``'s runtime over the same tables: it allocates one receive buffer per microbatch of
the step for every stage (``PipelineStage._setup_forward_recv_info``, torch 2.13), so its memory grows with M where a
schedule's own activations grow with P; it cannot evaluate under V placement; and its stage and schedule internals, which
deferred weight gradients need, changed in each of torch 2.11 to 2.13. ``docs/architecture.md`` has the comparison.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_mtp.model.loss import HeadStats
from dist_mtp.model.transformer import MicroBatch
from dist_mtp.pipeline.plan import Plan
from dist_mtp.pipeline.stage import Stage
from dist_mtp.pipeline.table import Action, Kind

FORWARD_EDGE, BACKWARD_EDGE = "forward", "backward"


class PipelineRuntime:
    """This rank's part of the pipeline.

    Args:
        plan: stages, placement and tables.
        stages: this rank's stages by index.
        pp_rank: this rank's place in the pipeline.
        global_rank: world rank of a pipeline rank in this data replica.
        hidden_shape: [B, T, D] of one microbatch's hidden states.
        on_action: told before every action; lets a watchdog say where a rank stands.
    """

    def __init__(
        self,
        plan: Plan,
        stages: dict[int, Stage],
        *,
        pp_rank: int,
        group: dist.ProcessGroup,
        global_rank: Callable[[int], int],
        hidden_shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        on_action: Callable[[Action], None] = lambda action: None,
    ) -> None:
        self.stages = stages
        self._plan, self._pp_rank, self._group, self._global_rank = plan, pp_rank, group, global_rank
        self._hidden_shape, self._dtype, self._device = hidden_shape, dtype, device
        self._on_action = on_action
        # Tensors on their way into a stage, by (direction, stage, microbatch). The request is None when both stages are
        # on this rank.
        self._inbox: dict[tuple[str, int, int], tuple[dist.Work | None, Tensor]] = {}
        # Tensors on their way out, kept alive until the request is done.
        self._outbox: dict[tuple[str, int, int], Tensor] = {}
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def train_step(self, batches: Sequence[MicroBatch], mark: Callable[[], None] = lambda: None) -> list[HeadStats]:
        """Forward and backward of all microbatches; gradients are left on the parameters.

        Args:
            mark: called three times for every action of computation: before the wait for its input, before and after the
                computation. A clock that is read there measures the step (``dist_mtp.parallel.timeline``).

        Returns:
            Statistics per microbatch on the rank of the last stage, an empty list elsewhere.
        """
        return self._run(self._plan.lowered[self._pp_rank], batches, mark)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> list[HeadStats]:
        """As :meth:`train_step`, forward only. Right under every schedule; nothing is left behind."""
        modes = [stage.model.training for stage in self.stages.values()]
        for stage in self.stages.values():
            stage.model.eval()
        try:
            return self._run(self._plan.forward_only(len(batches))[self._pp_rank], batches, lambda: None)
        finally:
            for stage, training in zip(self.stages.values(), modes, strict=True):
                stage.model.train(training)

    def _run(
        self, actions: Sequence[Action], batches: Sequence[MicroBatch], mark: Callable[[], None]
    ) -> list[HeadStats]:
        for action in actions:
            self._on_action(action)
            if action.kind.is_compute:
                self._perform(action, batches[action.microbatch], mark)
            else:
                self._communicate(action)
            while self._sending and self._sending[0][0].is_completed():
                self._sending.popleft()
        while self._sending:
            self._sending.popleft()[0].wait()
        last = self.stages.get(len(self._plan.stage_to_rank) - 1)
        return last.take_stats() if last is not None else []

    def _perform(self, action: Action, batch: MicroBatch, mark: Callable[[], None]) -> None:
        mark()
        received = self._input(action)
        mark()
        result = self._compute(action, received, batch)
        mark()
        self._hand_over(action, result)

    def _input(self, action: Action) -> Tensor | None:
        """What the action needs from a neighbouring stage, once it is there; None if it needs nothing."""
        stage, is_last = action.stage, action.stage == len(self._plan.stage_to_rank) - 1
        if action.kind is Kind.F and stage > 0:
            return self._take(FORWARD_EDGE, stage, action.microbatch)
        if action.kind in (Kind.I, Kind.B) and not is_last:
            return self._take(BACKWARD_EDGE, stage, action.microbatch)
        return None

    def _compute(self, action: Action, received: Tensor | None, batch: MicroBatch) -> Tensor | None:
        """The action's result for a neighbouring stage, if it has one."""
        stage, microbatch = self.stages[action.stage], action.microbatch
        if action.kind is Kind.F:
            return stage.forward(microbatch, received, batch)
        if action.kind is Kind.W:
            stage.weight_gradients(microbatch)
            return None
        return stage.backward(microbatch, received, defer_weights=action.kind is Kind.I)

    def _communicate(self, action: Action) -> None:
        stage, microbatch = action.stage, action.microbatch
        match action.kind:
            case Kind.SEND_F:
                self._send(FORWARD_EDGE, stage, stage + 1, microbatch)
            case Kind.SEND_B:
                self._send(BACKWARD_EDGE, stage, stage - 1, microbatch)
            case Kind.RECV_F:
                self._receive(FORWARD_EDGE, stage - 1, stage, microbatch)
            case Kind.RECV_B:
                self._receive(BACKWARD_EDGE, stage + 1, stage, microbatch)

    def _hand_over(self, action: Action, result: Tensor | None) -> None:
        """Pass a result to a stage on this rank at once, or keep it for its SEND."""
        if result is None:
            return
        edge, target = (FORWARD_EDGE, action.stage + 1) if action.kind is Kind.F else (BACKWARD_EDGE, action.stage - 1)
        if target in self.stages:
            self._inbox[edge, target, action.microbatch] = (None, result)
        elif target < len(self._plan.stage_to_rank):
            self._outbox[edge, action.stage, action.microbatch] = result

    def _take(self, edge: str, stage: int, microbatch: int) -> Tensor:
        request, tensor = self._inbox.pop((edge, stage, microbatch))
        if request is not None:
            request.wait()
        return tensor

    def _send(self, edge: str, source: int, target: int, microbatch: int) -> None:
        tensor = self._outbox.pop((edge, source, microbatch)).contiguous()
        request = dist.isend(tensor, self._peer(target), group=self._group)
        assert request is not None
        self._sending.append((request, tensor))

    def _receive(self, edge: str, source: int, target: int, microbatch: int) -> None:
        buffer = torch.empty(self._hidden_shape, dtype=self._dtype, device=self._device)
        request = dist.irecv(buffer, self._peer(source), group=self._group)
        self._inbox[edge, target, microbatch] = (request, buffer)

    def _peer(self, stage: int) -> int:
        return self._global_rank(self._plan.stage_to_rank[stage])
