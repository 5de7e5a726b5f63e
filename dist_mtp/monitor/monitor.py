"""Where a run's numbers go. The trainer tells one object; ranks other than 0 have the silent one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from dist_mtp.config import Config, to_dict
from dist_mtp.monitor.console import Console
from dist_mtp.monitor.expert_loads import EXPERT_LOADS, ExpertLoadsFile
from dist_mtp.monitor.formatting import span
from dist_mtp.monitor.metrics import METRICS, MetricsFile, read_metrics
from dist_mtp.monitor.plan_files import PICTURE, write_plan
from dist_mtp.monitor.report import final_report, median_tokens_per_s, parameter_table
from dist_mtp.monitor.tensorboard import TensorBoard
from dist_mtp.monitor.throughput import Throughput
from dist_mtp.monitor.timeline_files import TIMELINE_PICTURE, drop_timelines, write_timeline
from dist_mtp.pipeline.costs import list_units, unit_parameters
from dist_mtp.pipeline.plan import Plan
from dist_mtp.pipeline.timeline import MeasuredTimeline

Metrics = dict[str, float]

_NO_HPARAMS = frozenset({"run.dir", "run.name", "data.cache_dir"})
"""Names of folders: TensorBoard shows that of the run anyway, and no result depends on one."""


class Monitor:
    """Hears everything and says nothing."""

    def start(self, resume_step: int) -> None:
        """Training begins after ``resume_step`` (0: from scratch)."""

    def log(self, metrics: Metrics) -> None:
        """One trained step."""

    def expert_loads(self, step: int, layers: Sequence[int], load_LE: Tensor) -> None:
        """Tokens per expert [layers, E] over the global batch, before :meth:`log` of the same step."""

    def timeline(self, step: int, timeline: MeasuredTimeline) -> None:
        """When each rank of the first data replica computed what, before :meth:`log` of the same step."""

    def checkpoint_written(self, path: Path) -> None: ...

    def notice(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def finish(self) -> None:
        """The run ended well."""

    def leave_terminal(self) -> None:
        """The process is about to end at once: nothing but the lines may stay on the terminal."""

    def close(self) -> None:
        """The last call, however the run ended; another one does nothing."""


class RunMonitor(Monitor):
    """Rank 0's: run folder, console and TensorBoard.

    Args:
        corpus_info: ``corpus.json`` of the tokenised corpus.
        throughput: turns step times into tokens/s and MFU.
    """

    def __init__(self, config: Config, plan: Plan, corpus_info: Mapping[str, Any], throughput: Throughput) -> None:
        self._config, self._plan, self._corpus_info, self._throughput = config, plan, corpus_info, throughput
        self.run_dir = Path(config.run_dir)
        self.last_metrics: Metrics = {}
        log_file = self.run_dir / "logs" / "rank_0.log"
        self.console = Console(sys.stdout, log_file=log_file, progress=config.monitor.progress)
        self._metrics_file: MetricsFile | None = None
        self._loads_file: ExpertLoadsFile | None = None
        self._tensorboard: TensorBoard | None = None
        self._last_checkpoint: Path | None = None
        self._last_loads: dict[int, Tensor] = {}
        self._timeline: MeasuredTimeline | None = None
        for stream in (sys.stdout, sys.stderr):
            self.console.put_above_bar(stream)

    def start(self, resume_step: int) -> None:
        config = self._config
        plan_text = write_plan(self._plan, self.run_dir)
        self._metrics_file = MetricsFile(self.run_dir / METRICS, resume_step or None)
        if config.moe_layers:
            self._loads_file = ExpertLoadsFile(self.run_dir / EXPERT_LOADS, resume_step or None)
        drop_timelines(self.run_dir, after=resume_step)
        if config.monitor.tensorboard:
            self._tensorboard = TensorBoard(
                self.run_dir / "tensorboard",
                has_mtp=config.mtp.depth > 0,
                has_experts=bool(config.moe_layers),
                aux_losses=any(config.moe.aux_loss_coeffs.values()),
                ep=config.parallel.ep,
                fp8=config.precision.name == "fp8" and config.precision.fp8_statistics_every > 0,
                timelines=config.timeline_every > 0,
                config_text=yaml.safe_dump(to_dict(config), sort_keys=False),
                plan_text=plan_text,
                hparams={key: value for key, value in _flat(to_dict(config)).items() if key not in _NO_HPARAMS},
                purge_step=resume_step + 1 if resume_step else None,
                report=self.warn,
            )
            self._tensorboard.add_image("plan", self.run_dir / PICTURE)
        self.console.header(_describe(config, self._plan, self._corpus_info))
        if resume_step:
            self.console.notice(f"resumed after step {resume_step}")

    def log(self, metrics: Metrics) -> None:
        metrics |= self._throughput.metrics(metrics["step_time"])
        self.last_metrics = metrics
        assert self._metrics_file is not None, "start() comes first"
        self._metrics_file.write(metrics)
        if self._tensorboard is not None:
            self._tensorboard.write(metrics)
        self._show_timeline(int(metrics["step"]))
        total = self._config.train.steps
        if metrics["step"] % self._config.monitor.log_every == 0 or metrics["step"] == total:
            self.console.step_line(metrics, total)
        else:
            self.console.progress(metrics, total)
        if "eval_loss_main" in metrics:
            self.console.eval_line(metrics, total)

    def expert_loads(self, step: int, layers: Sequence[int], load_LE: Tensor) -> None:
        self._last_loads = dict(zip(layers, load_LE, strict=True))  # views: the host copy is made once, by finish()
        if self._loads_file is not None:
            self._loads_file.write(step, layers, load_LE)
        if self._tensorboard is not None:
            self._tensorboard.write_expert_loads(step, layers, load_LE)

    def timeline(self, step: int, timeline: MeasuredTimeline) -> None:
        self._timeline = timeline  # drawn by log(), when the step's time is taken

    def _show_timeline(self, step: int) -> None:
        timeline, self._timeline = self._timeline, None
        if timeline is None:
            return
        try:
            write_timeline(self._plan, step, timeline, self.run_dir)
        except OSError as error:
            self.warn(f"no timeline of step {step}: {error}")
            return
        if self._tensorboard is not None:
            self._tensorboard.add_image("timeline/measured", self.run_dir / TIMELINE_PICTURE, step)

    def checkpoint_written(self, path: Path) -> None:
        self._last_checkpoint = path
        self.console.notice(f"checkpoint {path}")

    def notice(self, text: str) -> None:
        self.console.notice(text)

    def warn(self, text: str) -> None:
        self.console.warn(text)

    def finish(self) -> None:
        rows = read_metrics(self.run_dir / METRICS)
        evaluated = {key: value for key, value in self.last_metrics.items() if key.startswith("eval_")}
        self.console.notice("")
        self.console.header(
            final_report(
                rows[0],
                rows[-1],
                evaluated,
                self._corpus_info,
                self.run_dir,
                median_tokens_per_s=median_tokens_per_s(rows),
                last_checkpoint=self._last_checkpoint,
                expert_loads={layer: load_E.tolist() for layer, load_E in self._last_loads.items()},
            )
        )

    def leave_terminal(self) -> None:
        self.console.clear_bar()

    def close(self) -> None:
        try:
            for output in (self._tensorboard, self._metrics_file, self._loads_file):
                if output is not None:
                    output.close()
        finally:  # a full disk must not leave the bar behind
            self.console.close()


def _describe(config: Config, plan: Plan, corpus_info: Mapping[str, Any]) -> list[str]:
    """What this run is: data, parallelism, stages and parameters."""
    splits = corpus_info["splits"]
    stages = [f"  stage {s.index} on rank {s.rank}: {span(s.unit_names)} ({len(s.units)} units)" for s in plan.stages]
    sharing = f", experts shared by {config.parallel.ep}" if config.parallel.ep > 1 else ""
    return [
        f"run {config.run_name}: model {config.model.name}, MTP depth {config.mtp.depth}, precision {config.precision.name}",
        f"data {config.data.name} from {corpus_info['source']}: {splits['train']['tokens']:,} training and "
        f"{splits['validation']['tokens']:,} validation tokens, unigram entropy {corpus_info['unigram_entropy_nats']:.3f} nats",
        f"{plan.pp} pipeline x {plan.dp} data ranks{sharing}, placement {plan.placement}, schedule {plan.schedule}, "
        f"{plan.micro_batches} microbatches of {config.train.micro_batch_size} x {config.train.seq_len} tokens, "
        f"predicted bubble {plan.timeline.bubble:.1%}"
        + ("" if str(plan.recompute) == "none" else f", recomputed: {plan.recompute}"),
        *stages,
        *(f"warning: {warning}" for warning in plan.warnings),
        "",
        *parameter_table(_parameter_rows(config)),
        "",
    ]


def _parameter_rows(config: Config) -> list[tuple[str, int]]:
    rows: dict[str, int] = {}
    labels = {"embedding": "embedding", "head": "final norm, head and MTP"}
    for unit, params in zip(list_units(config), unit_parameters(config), strict=True):
        label = labels.get(unit.kind, unit.kind.replace("_", " "))
        rows[label] = rows.get(label, 0) + params
    return list(rows.items())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of the leaves."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
