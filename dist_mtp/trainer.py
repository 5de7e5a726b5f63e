"""The training loop of one rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dist_mtp.batches import BatchSource
from dist_mtp.config import Config
from dist_mtp.data.corpus import TokenizedCorpus
from dist_mtp.dump import StepDump
from dist_mtp.errors import DivergedError
from dist_mtp.learning_rate import learning_rate
from dist_mtp.model.init import initialize
from dist_mtp.model.loss import HeadStats
from dist_mtp.model.moe import attach_dispatcher
from dist_mtp.model.transformer import LanguageModel, MicroBatch
from dist_mtp.monitor.monitor import Monitor
from dist_mtp.parallel.balance import gather_loads, move_router_biases
from dist_mtp.parallel.collectives import all_max
from dist_mtp.parallel.dispatch import AllToAllDispatcher, make_dispatcher
from dist_mtp.parallel.engine import Engine
from dist_mtp.parallel.fp8 import fp8_metrics, make_fp8
from dist_mtp.parallel.mesh import Mesh
from dist_mtp.parallel.timeline import Clock, gather_timeline, timeline_metrics
from dist_mtp.pipeline.plan import Plan
from dist_mtp.pipeline.runtime import PipelineRuntime
from dist_mtp.pipeline.stage import Stage
from dist_mtp.pipeline.timeline import is_measured
from dist_mtp.snapshot import restore_newest, save_snapshot
from dist_mtp.step_stats import Metrics, load_metrics, reduce_heads, reduce_health


class Trainer:
    """Trains this rank's stages.

    Args:
        config: resolved; equal on all ranks.
        monitor: where metrics go; silent on ranks other than 0.
        beat: told what the rank begins to do, for the watchdog.

    ``stop_signal`` may be set at any time, on any rank, by a signal handler: the step under way, with its evaluation if one
    is due, is finished on all ranks, so that a resumed run's metrics equal an uninterrupted one's; a checkpoint is written,
    and :meth:`run` returns with ``stopping`` set.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        plan: Plan,
        corpus: TokenizedCorpus,
        monitor: Monitor,
        beat: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.config, self.mesh, self.plan, self.corpus = config, mesh, plan, corpus
        self.monitor, self.beat = monitor, beat
        self.step = self.start = 0
        self.stop_signal = False
        self.stopping = False
        self.batches = BatchSource(config, mesh, corpus)
        mine = plan.stages_of(mesh.pp_rank)
        with mesh.device:
            units = {unit for stage in mine for unit in stage.unit_names}
            self.model = LanguageModel(config, units, expert_rank=mesh.expert_rank, recompute=plan.recompute)
        initialize(
            self.model,
            seed=config.train.seed,
            std=config.model.initializer_range,
            first_expert=self.model.first_expert,
        )
        self.fp8 = make_fp8(config, self.model, mesh)
        dispatcher = make_dispatcher(config, mesh, self.fp8.backend if self.fp8 is not None else None)
        attach_dispatcher(self.model, dispatcher)
        self.traffic = dispatcher.traffic if isinstance(dispatcher, AllToAllDispatcher) else None
        self.engine = Engine(config, self.model, mesh)
        if self.fp8 is not None:
            self.engine.on_weights_changed = self.fp8.forget_weights
        self.stages = {s.index: Stage(s.index, self.model, s.unit_names, self.engine.collect_gradients) for s in mine}
        self.runtime = PipelineRuntime(
            plan,
            self.stages,
            pp_rank=mesh.pp_rank,
            group=mesh.pipe_group,
            global_rank=mesh.global_rank,
            hidden_shape=(config.train.micro_batch_size, config.train.seq_len, config.model.hidden_size),
            dtype=torch.bfloat16 if config.is_mixed_precision else torch.float32,
            device=mesh.device,
            on_action=lambda action: beat(f"step {self.step}, action {action}"),
        )

    def run(self) -> Metrics:
        """Train to the last step, from the newest checkpoint if ``resume`` asks for it.

        Returns:
            The last step's metrics, evaluation included.

        Raises:
            DivergedError: the loss or a gradient was not finite; that update was not applied.
        """
        config = self.config
        fingerprint = self.corpus.info["fingerprint"]

        def restoring() -> None:
            self.beat("restore")

        def saving() -> None:
            self.beat(f"step {self.step}, checkpoint")

        restoring()
        self.step = self.start = start = restore_newest(
            config, self.engine, self.mesh, corpus=fingerprint, report=self.monitor.warn, beat=restoring
        )
        self.monitor.start(resume_step=start)
        if self.fp8 is not None:
            self.monitor.notice(f"FP8 backend {self.fp8.backend.name}, {len(self.fp8.layers)} layers on this rank")
        metrics: Metrics = {}
        for self.step in range(start + 1, config.train.steps + 1):
            metrics = self.train_step()
            is_last = self.step == config.train.steps
            if is_last or _due(self.step, config.eval.every):
                metrics |= self.evaluate()
            self.monitor.log(metrics)
            self._agree_to_stop()
            if is_last or self.stopping or _due(self.step, config.checkpoint.every):
                saving()
                path = save_snapshot(config, self.engine, self.mesh, step=self.step, corpus=fingerprint, beat=saving)
                self.monitor.checkpoint_written(path)
            if self.stopping:
                break
        return metrics

    def train_step(self) -> Metrics:
        """One optimizer step: forward and backward of all microbatches, reduction, update, router biases. Collective."""
        config, step = self.config, self.step
        started = time.perf_counter()
        self.beat(f"step {step}, data")
        mtp_weight = config.mtp.loss_weight_at((step - 1) * config.tokens_per_step)
        batches = self.batches.step("train", step - 1, mtp_weight)
        data_wait = time.perf_counter() - started
        dump = self._start_dump()
        measured = self.fp8 if _due(step, config.precision.fp8_statistics_every) else None
        if measured is not None:
            measured.measure()

        stats, timeline = self._run_pipeline(batches.micro_batches)
        self.beat(f"step {step}, gradient reduction")
        self.engine.reduce()
        if dump is not None:
            dump.add_gradients()
        lr = learning_rate(config.optim, step, config.train.steps)
        grad_norm = self.engine.step(lr)
        experts, bias_square_sum = self._balance_experts()
        sent_bytes, waited_s = self.traffic.take() if self.traffic is not None else (0, 0.0)

        extra = (bias_square_sum if self.mesh.dp_rank == 0 else 0.0, sent_bytes)
        totals, (bias_square_sum, all_sent_bytes) = reduce_heads(stats, config.mtp.depth + 1, self.mesh, extra)
        if dump is not None:
            dump.write(self.batches.whole("train", step - 1), totals.losses())
        loss = sum(c * s for c, s in zip(batches.coefficients, totals.loss_sums, strict=True))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; the update was not applied. Lower optim.lr or raise "
                "optim.warmup_steps, and resume from the last checkpoint"
            )
        return {
            "step": step,
            "tokens": step * config.tokens_per_step,
            "loss": loss,
            **totals.metrics(),
            "mtp_weight": mtp_weight,
            "grad_norm": grad_norm,
            "lr": lr,
            **({"router_bias_norm": math.sqrt(bias_square_sum), **experts} if experts else {}),
            **(fp8_metrics(measured.statistics, self.mesh) if measured is not None else {}),
            **({"all_to_all_bytes": all_sent_bytes} if self.traffic is not None else {}),
            **timeline,
            **reduce_health(waited_s if self.traffic is not None else None, self.mesh),
            "data_wait_s": data_wait,
            "step_time": time.perf_counter() - started,
        }

    def evaluate(self) -> Metrics:
        """``eval_*`` losses and draft agreement on the validation documents; the same rows every time. Collective."""
        stats = []
        for index in range(self.batches.validation_batches()):
            self.beat(f"evaluation after step {self.step}, batch {index}")
            batches = self.batches.step("validation", index, self.config.mtp.loss_weight)
            stats += self.runtime.evaluate(batches.micro_batches)
        if self.traffic is not None:
            self.traffic.take()  # of no training step
        totals, _ = reduce_heads(stats, self.config.mtp.depth + 1, self.mesh)
        metrics = {f"eval_{name}": value for name, value in totals.metrics().items()}
        if "eval_loss_main" in metrics:
            validation = self.corpus.info["splits"]["validation"]
            bytes_per_token = validation["text_bytes"] / validation["tokens"]
            metrics["eval_bits_per_byte"] = metrics["eval_loss_main"] / math.log(2) / bytes_per_token
        return metrics

    def _run_pipeline(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[HeadStats], Metrics]:
        """Forward and backward of the step, with its bubble if this is a step to measure. Collective."""
        statistics_every = self.config.precision.fp8_statistics_every if self.fp8 is not None else 0
        every = self.config.timeline_every
        if not is_measured(self.step, every, start=self.start, statistics_every=statistics_every):
            return self.runtime.train_step(micro_batches), {}
        self.beat(f"step {self.step}, common start of its timeline")
        clock = Clock(self.mesh.device)
        stats = self.runtime.train_step(micro_batches, clock.mark)
        self.beat(f"step {self.step}, timeline")
        timeline = gather_timeline(clock, self.plan, self.mesh)
        self.monitor.timeline(self.step, timeline)
        return stats, timeline_metrics(timeline, self.plan, self.mesh)

    def _balance_experts(self) -> tuple[Metrics, float]:
        """Count the step's loads and move the router biases; with the square sum of this rank's biases. Collective."""
        config = self.config
        if not config.moe_layers:
            return {}, 0.0
        loads = gather_loads(self.model, config, self.mesh)
        self.monitor.expert_loads(self.step, loads.layers, loads.load_LE)
        speed = config.moe.bias_update_speed_at((self.step - 1) * config.tokens_per_step)
        return load_metrics(loads, config.moe), move_router_biases(self.model, loads, speed)

    def _agree_to_stop(self) -> None:
        """One rank's signal stops all of them at the same place. Collective."""
        if not self.stopping:
            (signalled,) = all_max([float(self.stop_signal)], self.mesh.device)
            self.stopping = signalled > 0

    def _start_dump(self) -> StepDump | None:
        if self.step not in self.config.debug.dump_steps:
            return None
        return StepDump(Path(self.config.run_dir), self.step, self.engine, self.mesh)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
