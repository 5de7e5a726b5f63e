"""How processes of a run learn that they shall end."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LIBC = ctypes.CDLL(None)  # not loaded between fork and exec
_PR_SET_PDEATHSIG = 1
"""``prctl(2)``."""


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Get a signal when the process that started this one is gone, however it ended; Linux only."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)


@contextmanager
def handled(handler: Callable[[int, object], object]) -> Iterator[None]:
    """Call ``handler(number, frame)`` on either signal; afterwards both do what they did before. Main thread only."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
