"""``dist-mtp bench``: measure parts of training on this device, without starting a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dist_mtp.cli.compose import compose
from dist_mtp.config import Config, resolve
from dist_mtp.config_checks import use_cuda_for
from dist_mtp.data.tokenizers import tokenizer_vocab_size
from dist_mtp.errors import ConfigError
from dist_mtp.monitor.atomic import replace_text
from dist_mtp.typed_config import nearest

if TYPE_CHECKING:
    import torch

BENCHMARKS = {
    "precision": "error, throughput and memory of the model's matrix products in each format",
    "recompute": "memory that a layer keeps from forward to backward, with each value of pipeline.recompute",
}
FOLDER = "bench"
"""Inside of the run folder, whose own files stay as they are."""


def main(arguments: list[str]) -> int:
    """``dist-mtp bench precision|recompute [overrides]``."""
    known = "".join(f"\n  {name}  {text}" for name, text in BENCHMARKS.items())
    if not arguments or "=" in arguments[0]:
        raise ConfigError(f"write the name of a benchmark after dist-mtp bench:{known}")
    name, overrides = arguments[0], arguments[1:]
    if name not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark '{name}'{nearest(name, list(BENCHMARKS))}; there are:{known}")
    config = compose(overrides)
    resolved = resolve(config, vocab_size=tokenizer_vocab_size(config.tokenizer))
    return precision(resolved) if name == "precision" else recompute(resolved)


def precision(config: Config) -> int:
    """Print the table and write ``bench/precision.json`` and ``bench/precision.png`` into the run folder; returns 0.

    Raises:
        ConfigError: the folder cannot be written, or there is no GPU for ``device=cuda``.
    """
    from dist_mtp.bench.picture import plot_precision
    from dist_mtp.bench.precision import measure
    from dist_mtp.bench.table import summary

    folder, device = _prepare(config)
    result = measure(config, device)
    print(summary(result, device))
    replace_text(folder / "precision.json", json.dumps(result.to_json(), indent=2) + "\n")
    plot_precision(result, device, folder / "precision.png")
    print(f"\nwritten to {folder / 'precision.json'} and {folder / 'precision.png'}")
    return 0


def recompute(config: Config) -> int:
    """Print the table and write ``bench/recompute.json`` into the run folder; returns 0.

    Raises:
        ConfigError: as :func:`precision`.
    """
    from dist_mtp.bench.recompute import measure, summary

    folder, device = _prepare(config)
    result = measure(config, device)
    print(summary(result))
    replace_text(folder / "recompute.json", json.dumps(result.to_json(), indent=2) + "\n")
    print(f"\nwritten to {folder / 'recompute.json'}")
    return 0


def _prepare(config: Config) -> tuple[Path, torch.device]:
    """Folder of the results, and the device."""
    import torch

    folder = Path(config.run_dir) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): choose another run.dir") from error
    on_gpu = use_cuda_for(config.device, local_ranks=1, gpus=torch.cuda.device_count())
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    torch.set_num_threads(config.launcher.threads_per_rank)  # as ranks have
    return folder, device
