"""What each rank runs.

Started by ``dist-mtp train``, or by hand::

    torchrun --nproc-per-node 2 -m dist_mtp.train parallel.pp=2
    deepspeed --num_accelerators 2 --module dist_mtp.train parallel.pp=2
    python -m dist_mtp.train parallel.pp=1

Arguments are Hydra overrides, or ``--config FILE`` with a resolved configuration, as the launcher writes it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_mtp.config import Config, config_hash, from_mapping, resolve
from dist_mtp.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_RANK_FAILURE,
    EXIT_TERMINATED,
    ConfigError,
    DistMtpError,
    DivergedError,
)

SIGNAL_PATIENCE_S = 5.0
"""Repeated signals within this time are one stop: Slurm, for example, signals all ranks and also their launcher, which
passes it on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    # Launchers append the local rank in two spellings; the environment says it as well.
    local_rank = ("--local_rank", "--local-rank")
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith(local_rank)]
    try:
        config = load_config(arguments)
    except DistMtpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    faulthandler.enable()  # a crash in native code shows its Python stack
    try:
        return run_rank(config, launched="--config" in arguments)
    except DistMtpError as error:
        # Raised alike on all ranks, or by one rank whose peers then fail in their next collective.
        print(f"error: {error}", file=sys.stderr, flush=True)
        _write_failure(config, error)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return EXIT_RANK_FAILURE


def load_config(arguments: Sequence[str]) -> Config:
    """The resolved file after ``--config``, or the composition of overrides.

    Raises:
        ConfigError: bad overrides, an unreadable file, or a sweep started inside a launcher.
    """
    if len(arguments) == 2 and arguments[0] == "--config":
        try:
            values = yaml.safe_load(Path(arguments[1]).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {arguments[1]} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"--config {arguments[1]} holds no configuration: give the config.yaml of a run folder")
        return from_mapping(values)
    if {"-m", "--multirun"} & set(arguments):
        raise ConfigError(
            "a sweep cannot run inside a launcher: use `dist-mtp train -m ...`, which launches every point"
        )
    from dist_mtp.cli.compose import compose

    return compose(arguments)


def run_rank(config: Config, *, launched: bool) -> int:
    """Set up this rank, train, and tear down.

    Args:
        launched: the launcher has prepared the run folder and the corpus.
    """
    import torch
    import torch.distributed as dist

    from dist_mtp.data.corpus import prepare
    from dist_mtp.data.tokenizers import tokenizer_vocab_size
    from dist_mtp.monitor.monitor import Monitor, RunMonitor
    from dist_mtp.parallel.collectives import check_same_hash
    from dist_mtp.parallel.mesh import init_process_group, make_mesh
    from dist_mtp.parallel.watchdog import Watchdog
    from dist_mtp.pipeline.plan import make_plan
    from dist_mtp.run_folder import prepare_run_folder
    from dist_mtp.trainer import Trainer

    timeout = config.train.hang_timeout_s
    device = init_process_group(timeout_s=2 * timeout)  # the watchdog speaks first
    vocab_size = tokenizer_vocab_size(config.tokenizer)
    config = resolve(config, vocab_size=vocab_size, world_size=dist.get_world_size())
    check_same_hash(config_hash(config), device, "configuration")
    rank = dist.get_rank()
    run_dir = Path(config.run_dir)
    if rank == 0 and not launched:
        prepare_run_folder(config)
    dist.barrier()
    log = _open_rank_log(run_dir, rank)
    if rank == 0 and not launched:
        # One writer; the others find the cache. Longer than any step, so the watchdog does not watch it.
        prepare(config.data, config.tokenizer)
    dist.barrier()
    watchdog = Watchdog(timeout, log)
    try:
        corpus = prepare(config.data, config.tokenizer, check_hashes=False)
        mesh = make_mesh(config, device)
        plan = make_plan(config, torch.cuda.get_device_name(device) if device.type == "cuda" else None)
        monitor = RunMonitor(config, plan, corpus.info, _throughput(config, device)) if rank == 0 else Monitor()
        trainer = Trainer(config, mesh, plan, corpus, monitor, watchdog.beat)
        received = _stop_on_signals(trainer)
        metrics = trainer.run()
        code = EXIT_DONE
        if trainer.stop_requested:
            code = EXIT_INTERRUPTED if signal.SIGINT in received else EXIT_TERMINATED
        if rank == 0:
            _report_end(config, trainer.step, metrics, code, monitor)
        watchdog.beat("shutdown")
        dist.barrier()
    except Exception as error:
        if rank == 0:  # the terminal may be gone; the other ranks' error output is their log
            print(error if isinstance(error, DistMtpError) else traceback.format_exc(), file=log)
        raise
    finally:
        watchdog.stop()
        log.flush()
    dist.destroy_process_group()
    return code


def _report_end(config: Config, step: int, metrics: dict[str, float], code: int, monitor: Any) -> None:
    """Write ``result.json`` and the final report.

    Args:
        metrics: of the last step; empty when the checkpoint that training starts from is of the last step, or a later.
    """
    from dist_mtp.monitor.metrics import read_metrics
    from dist_mtp.monitor.result import write_result

    if metrics and code == EXIT_DONE:
        monitor.finish()
    if not metrics:
        print(
            f"nothing to do: {config.run_dir} is trained to step {step} of train.steps={config.train.steps}; raise "
            "train.steps to train on, or set resume=never to start anew"
        )
        metrics = next(reversed(read_metrics(Path(config.run_dir) / "metrics.jsonl")), {})
    status = "done" if code == EXIT_DONE else "interrupted"
    write_result(config.run_dir, status, code, metrics, metrics.get("eval_loss_main"), None)
    monitor.close()


def _throughput(config: Config, device: Any) -> Any:
    import torch

    from dist_mtp.monitor.throughput import Throughput, cpu_peak_flops, cuda_peak_flops
    from dist_mtp.pipeline.costs import flops_per_token

    if device.type == "cuda":
        peak = cuda_peak_flops(torch.cuda.get_device_name(device))
    else:
        peak = cpu_peak_flops(torch.get_num_threads())
    return Throughput(flops_per_token(config), config.tokens_per_step, peak, config.world_size)


def _open_rank_log(run_dir: Path, rank: int) -> Any:
    """``logs/rank_K.log``; ranks other than 0 write everything there, rank 0's terminal is the console."""
    path = run_dir / "logs" / f"rank_{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open until the process ends)
    if rank != 0:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    return log


def _stop_on_signals(trainer: Any) -> list[signal.Signals]:
    """Finish the step, save and stop on SIGTERM or SIGINT; a second signal, given patience, ends the process at once."""
    received: list[signal.Signals] = []
    first = 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
        elif time.monotonic() - first > SIGNAL_PATIENCE_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(signal.Signals(number))
        trainer.stop_requested = True

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return received


def _write_failure(config: Config, error: DistMtpError) -> None:
    if os.environ.get("RANK", "0") != "0" or not Path(config.run_dir).is_dir():
        return
    from dist_mtp.monitor.result import write_result

    status = "diverged" if isinstance(error, DivergedError) else "failed"
    write_result(config.run_dir, status, error.exit_code, {}, None, str(error))


if __name__ == "__main__":
    sys.exit(main())
