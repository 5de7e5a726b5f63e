"""What each kind of recomputation keeps of a layer: measured on this device, and as plans count it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dist_mtp.bench.saved import HALVES, half_deferred_bytes, half_saved_bytes, halves_of, with_local_experts
from dist_mtp.config import Config
from dist_mtp.pipeline import deferred, saved
from dist_mtp.precision.fp8.backend import make_backend
from dist_mtp.recompute import RECOMPUTE_LEVELS, Recompute

_MAX_EXPERT_WEIGHTS = 2e8
"""Of the experts that are measured; more change nothing but the score of each that a token keeps."""
_SAVED: dict[str, Callable[[Config, Recompute], float]] = dict(
    zip(HALVES, (saved.attention_half, saved.dense_half, saved.moe_half), strict=True)
)
_DEFERRED = dict(zip(HALVES, (deferred.attention_half, deferred.dense_half, deferred.moe_half), strict=True))


@dataclass(frozen=True)
class Kept:
    """Bytes of one token: ``measured`` on the device, ``planned`` by ``dist_mtp.pipeline``."""

    measured: float
    planned: float


@dataclass(frozen=True)
class RecomputeResult:
    """By half of a layer: ``kept`` from forward to backward under each kind, ``deferred`` from I to W under any."""

    model: str
    precision: str
    torch: str
    kept: dict[str, dict[str, Kept]]
    deferred: dict[str, Kept]

    def to_json(self) -> dict[str, Any]:
        """The content of ``recompute.json``."""
        return dataclasses.asdict(self)


def measure(config: Config, device: torch.device) -> RecomputeResult:
    """Measure one microbatch of ``config`` (resolved)."""
    config = with_local_experts(config, _MAX_EXPERT_WEIGHTS)
    fp8 = make_backend(config.precision.fp8_backend, device) if config.precision.name == "fp8" else None
    dtype = torch.bfloat16 if config.is_mixed_precision else torch.float32
    halves = halves_of(config)
    return RecomputeResult(
        model=config.model.name,
        precision=config.precision.name,
        torch=torch.__version__,
        kept={
            half: {
                str(level): Kept(
                    half_saved_bytes(config, half, device, dtype=dtype, fp8=fp8, recompute=level),
                    _SAVED[half](config, level),
                )
                for level in RECOMPUTE_LEVELS
            }
            for half in halves
        },
        deferred={
            half: Kept(half_deferred_bytes(config, half, device, dtype=dtype, fp8=fp8), _DEFERRED[half](config))
            for half in halves
        },
    )


def summary(result: RecomputeResult) -> str:
    """A Markdown table: a row for each kind, a column for each half of a layer, ``measured (planned)``."""
    halves = list(result.kept)
    lines = [
        f"bytes per token, measured (planned); model={result.model} precision={result.precision} torch {result.torch}",
        "",
        f"| pipeline.recompute | {' | '.join(halves)} |",
        "|---|" + "---:|" * len(halves),
    ]
    for level in map(str, RECOMPUTE_LEVELS):
        lines.append(f"| {level} | {' | '.join(_cell(result.kept[half][level]) for half in halves)} |")
    lines.append(f"| from I to W, under all | {' | '.join(_cell(result.deferred[half]) for half in halves)} |")
    return "\n".join(lines)


def _cell(kept: Kept) -> str:
    return f"{kept.measured:,.0f} ({kept.planned:,.0f})"
