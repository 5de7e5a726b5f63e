"""Ranks as threads: a checkpoint needs a barrier, not a process group."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_mtp.checkpoint.format import TensorSlice
from dist_mtp.checkpoint.save import save

WEIGHT = "model.layers.0.mlp.experts.5.gate_proj.weight"


@dataclass
class Outcome:
    """What ``save`` did on one rank."""

    path: Path | None = None
    error: BaseException | None = None


def save_outcomes(
    folder: Path,
    step: int,
    ranks: list[Iterable[TensorSlice]],
    *,
    run_ids: list[str] | None = None,
    state: dict[str, Any] | None = None,
    keep: int = 2,
) -> list[Outcome]:
    """Call ``save`` on one thread per element of ``ranks``, the slices of that rank."""
    barrier = threading.Barrier(len(ranks), timeout=20)
    outcomes = [Outcome() for _ in ranks]

    def one(rank: int) -> None:
        try:
            outcomes[rank].path = save(
                folder,
                step=step,
                run_id=run_ids[rank] if run_ids else "run",
                rank=rank,
                world_size=len(ranks),
                slices=ranks[rank],
                state=state or {},
                barrier=lambda: barrier.wait() and None,
                keep=keep,
            )
        except Exception as error:
            outcomes[rank].error = error
        except BaseException as error:  # a simulated kill: the others must not wait for this rank
            outcomes[rank].error = error
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def save_ranks(folder: Path, step: int, ranks: list[Iterable[TensorSlice]], **options: Any) -> Path:
    """A save that succeeds on every rank and returns the same path on all."""
    outcomes = save_outcomes(folder, step, ranks, **options)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    [path] = {outcome.path for outcome in outcomes}
    assert path is not None
    return path


def cut(kind: str, name: str, tensor: torch.Tensor, bounds: list[int]) -> list[TensorSlice]:
    """Slices of ``tensor`` between consecutive ``bounds``."""
    flat = tensor.reshape(-1)
    return [
        TensorSlice(kind, name, tuple(tensor.shape), low, flat[low:high]) for low, high in itertools.pairwise(bounds)
    ]


def filled(value: float, world_size: int = 2) -> list[Iterable[TensorSlice]]:
    """A [3, 4] weight full of ``value``, cut over ``world_size`` ranks: tells checkpoints apart."""
    bounds = [12 * rank // world_size for rank in range(world_size + 1)]
    return [[piece] for piece in cut("param", WEIGHT, torch.full((3, 4), value), bounds)]
