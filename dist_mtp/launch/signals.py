"""SIGTERM and SIGINT, handled for a while."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def handled(handler: Callable[[int, object], object]) -> Iterator[None]:
    """Call ``handler(number, frame)`` on either signal; afterwards both do what they did before. Main thread only."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
