"""From a step's duration to tokens/s, FLOP/s and the share of the device's peak (MFU)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from dist_mtp.pipeline.devices import cuda_profile


@dataclass(frozen=True)
class Throughput:
    """What a step of known work means for its duration."""

    flops_per_token: float
    """Floating-point operations of forward and backward per trained token."""
    tokens_per_step: int
    """Tokens of one global batch."""
    peak_flops_per_s: float | None
    """What one device could do at best; None when unknown, and there is no ``mfu`` then."""
    num_devices: int

    def metrics(self, step_time: float) -> dict[str, float]:
        """``tokens_per_s``, ``tflops_per_device`` (1e12 FLOP/s) and ``mfu`` (0..1) of a step of ``step_time`` seconds."""
        tokens_per_s = self.tokens_per_step / step_time
        flops_per_device = tokens_per_s * self.flops_per_token / self.num_devices
        result = {"tokens_per_s": tokens_per_s, "tflops_per_device": flops_per_device / 1e12}
        if self.peak_flops_per_s is not None:
            result["mfu"] = flops_per_device / self.peak_flops_per_s
        return result


def cuda_peak_flops(name: str) -> float | None:
    """bf16 dense peak (FLOP/s) of a CUDA device by ``torch.cuda.get_device_name()``; None for devices not listed."""
    profile = cuda_profile(name)
    return None if profile is None else profile.peak_flops_per_s


def cpu_peak_flops(threads: int, seconds: float = 0.1) -> float:
    """FLOP/s of the fastest 512x512x512 fp32 matrix product within ``seconds``, on ``threads`` threads.

    A measured stand-in for a data sheet. Ranks that share cores should measure at the same time, as they will train.
    """
    size = 512
    before = torch.get_num_threads()
    # A generator of its own: drawing from the global one would change the run's initial weights.
    a, b = torch.randn(2, size, size, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(threads)
    try:
        torch.mm(a, b)  # the first product also creates the threads
        best = float("inf")
        deadline = time.perf_counter() + seconds
        while (start := time.perf_counter()) < deadline:
            torch.mm(a, b)
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / best
