"""``dist-mtp train``: validate once, prepare the run folder, start the ranks on the resolved file."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from dist_mtp.cli.compose import compose
from dist_mtp.cli.gpus import visible_gpus
from dist_mtp.config import Config, resolve
from dist_mtp.config_checks import check_installed, use_cuda_for
from dist_mtp.data.corpus import prepare
from dist_mtp.data.sources import check_source
from dist_mtp.data.tokenizers import check_tokenizer, tokenizer_vocab_size
from dist_mtp.errors import EXIT_DONE, ConfigError
from dist_mtp.launch import deepspeed, slurm, torchrun
from dist_mtp.launch.cluster import SEVERAL_NODES, Cluster, addressed, plan_cluster, settled
from dist_mtp.launch.dry_run import CORPUS, dry_run
from dist_mtp.launch.local import launch
from dist_mtp.pipeline.plan import make_plan
from dist_mtp.run_folder import prepare_run_folder


def main(arguments: list[str]) -> int:
    """Run one configuration, or a sweep with ``-m``."""
    if {"-m", "--multirun"} & set(arguments):
        from dist_mtp.cli.sweep import sweep

        return sweep([a for a in arguments if a not in ("-m", "--multirun")])
    return train(compose(arguments))


def train(config: Config) -> int:
    """Check everything that needs no process, then start the ranks; returns the exit code.

    Raises:
        ConfigError: before anything was started or written.
        DataError: the corpus is damaged; before anything was started.
    """
    if config.launcher.name == "slurm":
        job = prepare_job(config)
        if config.launcher.dry_run:
            print(dry_run(job.config, None, config.launcher.min_nodes))
            return EXIT_DONE
        return slurm.submit(job.config, job.corpus, min_nodes=config.launcher.min_nodes)
    config, resolved, cluster = _checked(config)
    if config.launcher.dry_run:
        print(dry_run(resolved, cluster))
        return EXIT_DONE
    if cluster is not None and config.launcher.name == "torchrun":
        # The first node prepares data and folder once all have come.
        return torchrun.run(config, cluster)
    if cluster is not None:
        deepspeed.check_hosts(resolved, cluster)  # before a run is set aside for one that could not start
    corpus = prepare(config.data, config.tokenizer).folder
    prepare_run_folder(resolved)
    print(f"run folder {resolved.run_dir}, {resolved.world_size} ranks", file=sys.stderr)
    if cluster is not None:
        return deepspeed.run(resolved, cluster, corpus)
    return launch(resolved, corpus)


@dataclass(frozen=True)
class Job:
    """A run that is ready for a batch system."""

    config: Config
    """Resolved; what the job starts, and starts again, with."""
    corpus: Path
    """Folder of the tokenised corpus."""


def prepare_job(config: Config) -> Job:
    """Check a run that other machines will train, and prepare its corpus and folder; a dry run writes neither.

    Raises:
        ConfigError: before anything was written.
        DataError: the corpus is damaged.
    """
    _, resolved, _ = _checked(config)
    # An old run is set aside once, here. A job would set aside its own folder, and every requeue what it has trained.
    started = dataclasses.replace(resolved, resume="auto") if resolved.resume == "never" else resolved
    if config.launcher.dry_run:
        return Job(started, CORPUS)
    corpus = prepare(config.data, config.tokenizer).folder
    prepare_run_folder(resolved)
    return Job(started, corpus)


def _checked(config: Config) -> tuple[Config, Config, Cluster | None]:
    """The configuration with its nodes' addresses, the same resolved for the ranks, and the nodes; None if
    ranks run here only.

    Raises:
        ConfigError: it cannot work.
    """
    check_source(config.data)
    check_tokenizer(config.tokenizer)
    check_installed(config)
    cluster = None
    if config.launcher.name in SEVERAL_NODES:
        cluster = plan_cluster(config, gpus=len(visible_gpus()))
        config = addressed(config, cluster)
    resolved = resolve_for(config, cluster)
    make_plan(resolved)  # ranks make their own; here it refuses a layout that does not fit before anything is started
    _check_resume(config)
    if cluster is not None and config.launcher.name == "torchrun" and cluster.nodes == 1 and not cluster.hosts:
        cluster = None  # nobody to meet: as the local launcher
    if cluster is None or not cluster.is_elsewhere:
        _check_device(resolved)
    if cluster is not None and config.launcher.name == "deepspeed":
        deepspeed.check(resolved, cluster, os.environ)
    if config.launcher.name == "slurm":
        slurm.check(resolved)
    return config, resolved, cluster


def resolve_for(config: Config, cluster: Cluster | None) -> Config:
    """The configuration of the ranks; ``parallel.dp`` is what the nodes make of it."""
    vocab_size = tokenizer_vocab_size(config.tokenizer)
    if cluster is None:
        return resolve(config, vocab_size=vocab_size)
    return resolve(settled(config, cluster.nodes), vocab_size=vocab_size, world_size=cluster.world_size)


def _check_resume(config: Config) -> None:
    if config.resume in ("auto", "never"):
        return
    if not (Path(config.resume) / "manifest.json").is_file():
        raise ConfigError(
            f"resume={config.resume} is not auto, never or the folder of a checkpoint, such as "
            "runs/NAME/checkpoints/step_00000100 with its manifest.json"
        )


def _check_device(config: Config) -> None:
    """Ranks check it too; here a refusal comes before anything is started. Only GPUs are worth the import of torch."""
    named = config.precision.name == "fp8" and config.precision.fp8_backend not in ("auto", "emulated")
    if config.device != "cuda" and not named:
        return
    import torch

    on_gpus = use_cuda_for(config.device, local_ranks=config.world_size, gpus=torch.cuda.device_count())
    if named:
        from dist_mtp.precision.fp8.backend import make_backend

        make_backend(config.precision.fp8_backend, torch.device("cuda" if on_gpus else "cpu"))
