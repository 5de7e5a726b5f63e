"""What expert parallelism costs: bytes sent and time waited."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist


class Traffic:
    """What a rank's all-to-all collectives cost since :meth:`take`."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self._waited_s = 0.0
        self._stream_waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def wait(self, work: dist.Work | None, device: torch.device) -> None:
        """Wait for a collective, and count the time: on CUDA that of the stream, as the host goes on."""
        assert work is not None, "collectives are asynchronous here, and every rank is in its group"
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            work.wait()
            after.record()
            self._stream_waits.append((before, after))
        else:
            started = time.perf_counter()
            work.wait()
            self._waited_s += time.perf_counter() - started

    def take(self) -> tuple[int, float]:
        """Bytes that left for other ranks, forward and backward, and seconds of waiting that nothing overlapped."""
        waited = self._waited_s
        for before, after in self._stream_waits:
            after.synchronize()
            waited += before.elapsed_time(after) / 1000
        sent = self.sent_bytes
        self.sent_bytes, self._waited_s, self._stream_waits = 0, 0.0, []
        return sent, waited
