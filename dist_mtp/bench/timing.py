"""How long things take: medians of interleaved repetitions."""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Case = TypeVar("Case")

MIN_ROUNDS = 3
_SCRATCH_BYTES = 2**29
"""Several times the L2 cache of any GPU; writing it takes about 0.2 ms."""


def interleaved_medians(
    cases: Mapping[Case, Callable[[], object]],
    device: torch.device,
    *,
    budget_s: float,
    max_rounds: int = 50,
    warm_up: int = 1,
) -> dict[Case, float]:
    """Median seconds of each case.

    A round runs all cases once, one after the other, so that a slow spell of the machine hits all alike. Rounds are repeated
    until the budget is spent, but at least three times. On GPUs times are those between two events around a case.

    Args:
        warm_up: rounds before the first that counts.
    """
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    end = time.monotonic() + budget_s
    for round_ in range(warm_up + max_rounds):
        if round_ >= warm_up + MIN_ROUNDS and time.monotonic() > end:
            break
        for case, function in cases.items():
            elapsed = elapsed_seconds(function, device)
            if round_ >= warm_up:
                seconds[case].append(elapsed)
    return {case: statistics.median(values) for case, values in seconds.items()}


def elapsed_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of one call, on an otherwise idle device.

    On one core it is this process's own time, so that other programs do not count; several threads would add theirs up.
    """
    if device.type == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        function()
        return clock() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    # Empties the L2 cache, as the rest of a step does, and gives the host time to launch what is measured.
    _scratch(device).zero_()
    before.record()
    function()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1e3


@functools.cache
def _scratch(device: torch.device) -> Tensor:
    return torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device=device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with Path("/proc/cpuinfo").open() as lines:
        names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())
