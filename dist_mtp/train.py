"""What each rank runs.

Started by ``dist-mtp train``, or by hand::

    torchrun --nproc-per-node 2 -m dist_mtp.train parallel.pp=2
    deepspeed --num_accelerators 2 --module dist_mtp.train parallel.pp=2
    python -m dist_mtp.train parallel.pp=1

Arguments are Hydra overrides, or ``--config FILE`` with a resolved configuration. The launchers add ``--corpus FOLDER``, the
tokenised corpus that they have prepared, ``--config-hash SHA256`` of the configuration that they have checked, and
``--rendezvous HOST:PORT`` where the environment does not say where ranks meet.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from dist_mtp.config import Config, config_hash, resolve
from dist_mtp.config_checks import check_installed
from dist_mtp.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_RANK_FAILURE,
    EXIT_TERMINATED,
    ConfigError,
    DistMtpError,
    DivergedError,
)
from dist_mtp.launcher_checks import parse_endpoint
from dist_mtp.parallel.environment import prepare_environment
from dist_mtp.run_folder import read_config
from dist_mtp.signals import end_with_parent

LEAVE_S = 1.0
"""What a hung rank gets to take its progress bar from the terminal."""
SIGNAL_PATIENCE_S = 5.0
"""Repeated signals within this time are one stop: Slurm, for example, signals all ranks and also their launcher, which
passes it on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    # Launchers append the local rank in two spellings; the environment says it as well.
    local_rank = ("--local_rank", "--local-rank")
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith(local_rank)]
    try:
        start = read_arguments(arguments)
        prepare_environment(os.environ, start.config.launcher, start.master)
    except DistMtpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    faulthandler.enable()  # a crash in native code shows its Python stack
    try:
        return run_rank(start.config, prepared=start.corpus)
    except DistMtpError as error:
        # Raised alike on all ranks, or by one rank whose peers then fail in their next collective.
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return EXIT_RANK_FAILURE


@dataclass(frozen=True)
class Start:
    """What a rank was started with."""

    config: Config
    corpus: Path | None = None
    """Folder of the tokenised corpus, if a launcher has prepared it and the run folder."""
    master: tuple[str, int] | None = None


def read_arguments(arguments: Sequence[str]) -> Start:
    """The resolved file after ``--config``, or the composition of overrides.

    Raises:
        ConfigError: bad overrides, an unreadable file or one that is not what was launched, or a sweep inside a launcher.
    """
    if not arguments or arguments[0] != "--config":
        if {"-m", "--multirun"} & set(arguments):
            raise ConfigError(
                "a sweep cannot run inside a launcher: use `dist-mtp train -m ...`, which launches every point"
            )
        from dist_mtp.cli.compose import compose

        return Start(compose(arguments))
    options = dict(itertools.zip_longest(arguments[::2], arguments[1::2], fillvalue=""))
    if unknown := set(options) - {"--config", "--corpus", "--config-hash", "--rendezvous"}:
        raise ConfigError(
            f"{', '.join(sorted(unknown))} cannot follow --config: change the file, or give overrides only"
        )
    corpus = options.get("--corpus")
    master = options.get("--rendezvous")
    return Start(
        config=read_config(Path(options["--config"]), options.get("--config-hash")),
        corpus=None if corpus is None else Path(corpus),
        master=None if master is None else parse_endpoint(master),
    )


def run_rank(config: Config, *, prepared: Path | None) -> int:
    """Set up this rank, train, and tear down.

    Args:
        prepared: folder of the tokenised corpus, if ``dist-mtp train`` started this rank: it has prepared and verified that
            and the run folder, and this rank ends with it. None prepares both here.
    """
    import torch
    import torch.distributed as dist

    from dist_mtp.data.corpus import open_corpus, prepare
    from dist_mtp.data.tokenizers import tokenizer_vocab_size
    from dist_mtp.launch.facts import node_facts
    from dist_mtp.parallel.collectives import check_same_hash, from_rank_0
    from dist_mtp.parallel.mesh import init_process_group
    from dist_mtp.run_folder import lock_run_folder, prepare_run_folder

    if prepared is not None:
        end_with_parent()
    check_installed(config)
    # The watchdog speaks first.
    device = init_process_group(timeout_s=2 * config.train.hang_timeout_s, device=config.device)
    config = resolve(config, vocab_size=tokenizer_vocab_size(config.tokenizer), world_size=dist.get_world_size())
    check_same_hash(str(node_facts()["code"]), device, "code", "install the same version of dist_mtp on all nodes")
    check_same_hash(config_hash(config), device, "configuration")
    rank, run_dir = dist.get_rank(), Path(config.run_dir)
    # Reading and tokenising a large corpus takes longer than any step may: ranks wait for rank 0 in a group of its own.
    setup, cpu = dist.new_group(backend="gloo", timeout=timedelta(days=1)), torch.device("cpu")
    held = []

    def take_folder() -> str:
        if prepared is None:
            prepare_run_folder(config)
        held.append(lock_run_folder(run_dir))
        return ""

    from_rank_0(take_folder, cpu, group=setup)
    log = _open_rank_log(run_dir, rank)
    faulthandler.register(
        signal.SIGUSR1, file=log, all_threads=True
    )  # a launcher that ends this rank asks for its stacks
    try:
        if prepared is None:
            folder = from_rank_0(lambda: str(prepare(config.data, config.tokenizer).folder), cpu, group=setup)
            prepared = Path(folder)
        code = _train(config, device, open_corpus(prepared), log)
    except Exception as error:
        if rank == 0:  # the terminal may be gone; the other ranks' error output is their log
            print(error if isinstance(error, DistMtpError) else traceback.format_exc(), file=log, flush=True)
            if isinstance(error, DistMtpError):
                _write_failure(config, error)
        raise
    finally:
        for lock in held:
            lock.close()
    dist.destroy_process_group()
    return code


def _train(config: Config, device: Any, corpus: Any, log: TextIO) -> int:
    """Build this rank's trainer and run it under a watchdog; returns the exit code."""
    import torch
    import torch.distributed as dist

    from dist_mtp.monitor.monitor import Monitor, RunMonitor
    from dist_mtp.parallel.collectives import broadcast_text, check_same_hash
    from dist_mtp.parallel.mesh import make_mesh
    from dist_mtp.parallel.watchdog import Watchdog
    from dist_mtp.pipeline.plan import make_plan
    from dist_mtp.trainer import Trainer

    monitor = Monitor()

    def end_process(code: int) -> None:
        # The process must end also if the terminal takes nothing more.
        tidy = threading.Thread(target=monitor.leave_terminal, daemon=True)
        tidy.start()
        tidy.join(LEAVE_S)
        os._exit(code)

    watchdog = Watchdog(config.train.hang_timeout_s, log, exit_process=end_process)
    try:
        mesh = make_mesh(config, device)
        # All ranks plan for rank 0's device: other GPUs would mean another plan.
        own_name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        plan = make_plan(config, broadcast_text(own_name, device) or None)
        check_same_hash(plan.digest(), device, "plan", "install the same version of Python and dist_mtp on all nodes")
        is_first = mesh.rank == 0
        if is_first:
            monitor = RunMonitor(config, plan, corpus.info, _throughput(config, device))
        trainer = Trainer(config, mesh, plan, corpus, monitor, watchdog.beat)
        received = _stop_on_signals(trainer)
        metrics = trainer.run()
        code = EXIT_DONE
        if trainer.stopping:
            code = EXIT_INTERRUPTED if signal.SIGINT in received else EXIT_TERMINATED
        if is_first:
            _report_end(config, trainer.step, metrics, code, monitor)
        watchdog.beat("shutdown")
        dist.barrier()
    finally:
        monitor.close()  # before the error of a run that failed is printed
        watchdog.stop()
        log.flush()
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
    monitor.close()  # at once, not when all other ranks are done


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
        trainer.stop_signal = True

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return received


def _write_failure(config: Config, error: DistMtpError) -> None:
    """Leave ``result.json``; only for a rank that holds the run folder, which may be another run's before."""
    from dist_mtp.monitor.result import write_result

    status = "diverged" if isinstance(error, DivergedError) else "failed"
    write_result(config.run_dir, status, error.exit_code, {}, None, str(error))


if __name__ == "__main__":
    sys.exit(main())
