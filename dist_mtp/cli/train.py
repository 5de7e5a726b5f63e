"""``dist-mtp train``: validate once, prepare the run folder, start the ranks on the resolved file."""

from __future__ import annotations

import sys
from pathlib import Path

from dist_mtp.cli.compose import compose
from dist_mtp.config import Config, resolve
from dist_mtp.config_checks import check_installed, use_cuda_for
from dist_mtp.data.corpus import prepare
from dist_mtp.data.sources import check_source
from dist_mtp.data.tokenizers import check_tokenizer, tokenizer_vocab_size
from dist_mtp.errors import ConfigError
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
    check_source(config.data)
    check_tokenizer(config.tokenizer)
    check_installed(config)
    config = resolve(config, vocab_size=tokenizer_vocab_size(config.tokenizer))
    make_plan(config)  # each rank makes its own; here it refuses a layout that does not fit before anything is started
    _check_resume(config)
    _check_device(config)
    corpus = prepare(config.data, config.tokenizer)
    prepare_run_folder(config)
    print(f"run folder {config.run_dir}, {config.world_size} ranks", file=sys.stderr)
    return launch(config, corpus.folder)


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
