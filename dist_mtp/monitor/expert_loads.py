"""``expert_loads.jsonl``: how the loads of each layer's experts are spread, every tenth step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_mtp.monitor.metrics import MetricsFile, read_rows

EXPERT_LOADS = "expert_loads.jsonl"
EVERY = 10
"""Steps between looks at all loads: one at each step would outweigh all other metrics, and hold up the device."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_KEY = "layer_"


@dataclass(frozen=True)
class Spread:
    """One layer's loads, over their mean."""

    steps: tuple[int, ...]
    quantiles_SQ: tuple[tuple[float, ...], ...]
    """Of the experts at each step, at :data:`QUANTILES`."""


def is_looked_at(step: int) -> bool:
    """Whether a step's loads are kept: those of the first and of every tenth."""
    return step == 1 or step % EVERY == 0


class ExpertLoadsFile:
    """Appends a row per step that :func:`is_looked_at`, such as ``{"step": 10, "layer_3": [0.5, 0.75, 1, 1.25, 1.5]}``.

    Args:
        resume_step: as of :class:`~dist_mtp.monitor.metrics.MetricsFile`.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._file = MetricsFile(path, resume_step)

    def write(self, step: int, layers: Sequence[int], load_LE: Tensor) -> None:
        """Append the quantiles of each layer; other steps copy nothing from the device.

        Args:
            layers: indices of the MoE layers, [L].
            load_LE: tokens of each expert, [L, E], on any device.
        """
        if not is_looked_at(step):
            return
        load_LE = load_LE.cpu().double()
        share_LE = load_LE / load_LE.mean(dim=1, keepdim=True)
        quantiles_LQ = share_LE.quantile(torch.tensor(QUANTILES, dtype=torch.float64), dim=1).T.tolist()
        self._file.write({"step": step} | {f"{_KEY}{k}": q for k, q in zip(layers, quantiles_LQ, strict=True)})

    def close(self) -> None:
        self._file.close()


def read_spreads(path: Path) -> dict[int, Spread]:
    """Layer -> its loads at all steps that the file has them for; empty if there is no file.

    Raises:
        DataError: a row other than the last is damaged.
    """
    rows = read_rows(path) if path.exists() else []
    layers = sorted({int(key.removeprefix(_KEY)) for row in rows for key in row if key.startswith(_KEY)})
    found = {layer: [(row["step"], tuple(row[f"{_KEY}{layer}"])) for row in rows] for layer in layers}
    return {layer: Spread(*zip(*points, strict=True)) for layer, points in found.items()}
