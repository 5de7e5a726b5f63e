"""Timing of contenders on all ranks: one after the other in every round, so that a slow spell of the machine hits all alike."""

from __future__ import annotations

import faulthandler
import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

_HEAD_START_S = 0.02
"""From the moment that all ranks have met until they start: longer than a barrier takes to let the last one go."""


@dataclass(frozen=True)
class Contender:
    """This rank's part of a pipeline. ``step``: all microbatches of a step, forward and backward."""

    name: str
    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    """Before each step, not timed."""


def interleaved(contenders: Sequence[Contender], rounds: int, step_timeout_s: float) -> dict[str, list[float]]:
    """Seconds of each contender's steps, after one round that does not count. Collective."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(rounds + 1):
        for contender in contenders:
            contender.prepare()
            gc.collect()
            faulthandler.dump_traceback_later(step_timeout_s, exit=True)
            elapsed = step_seconds(contender.step)
            faulthandler.cancel_dump_traceback_later()
            if number > 0:
                seconds[contender.name].append(elapsed)
    return seconds


def step_seconds(step: Callable[[], object]) -> float:
    """From the ranks' common start to the end of the last one; all on one host, whose clock they share. Collective."""
    start = _latest(time.perf_counter()) + _HEAD_START_S
    sleep_until(start)
    step()
    return _latest(time.perf_counter()) - start


def message_seconds(shape: Sequence[int], rounds: int = 50) -> float:
    """One way of a message between ranks 0 and 1 that do nothing else, the median. Collective."""
    tensor, rank = torch.zeros(*shape), dist.get_rank()
    times = []
    for _ in range(rounds):
        dist.barrier()
        if rank > 1:
            continue
        started = time.perf_counter()
        for sender in (0, 1):
            if rank == sender:
                dist.send(tensor, 1 - rank)
            else:
                dist.recv(tensor, 1 - rank)
        times.append((time.perf_counter() - started) / 2)
    result = torch.tensor(sorted(times)[len(times) // 2] if times else 0.0, dtype=torch.float64)
    dist.broadcast(result, src=0)
    return float(result)


def sleep_until(deadline: float) -> None:
    """Sleep until ``time.perf_counter()`` says ``deadline``; the last moment, which no sleep hits, is waited for awake."""
    left = deadline - time.perf_counter() - _WAKE_S
    if left > 0:
        time.sleep(left)
    while time.perf_counter() < deadline:
        pass


_WAKE_S = 7e-5
"""By how much the system oversleeps, about, with :func:`fine_timer`."""


def fine_timer() -> None:
    """Ask Linux not to let this thread oversleep for the sake of power: 50 microseconds by default."""
    import ctypes

    if os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK, in nanoseconds


def _latest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)
