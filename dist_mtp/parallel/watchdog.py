"""Turns a silent hang into stacks of all ranks and an exit code.

A pipeline bug, a dead peer behind a firewall or a stopped process all look alike: some rank waits in a receive for ever.
Every rank watches itself; when one stops, all others stop making progress too, so all of them write their stacks.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from dist_mtp.errors import EXIT_RANK_FAILURE


class Watchdog:
    """Ends the process with exit code 5 when :meth:`beat` was not called for ``timeout_s`` seconds.

    Args:
        stream: where the phase and the stacks of all threads go (the rank's log).
    """

    def __init__(self, timeout_s: float, stream: TextIO, *, exit_process: Callable[[int], None] = os._exit) -> None:
        self.phase = "start"
        self._timeout_s, self._stream, self._exit = timeout_s, stream, exit_process
        self._last_beat = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, phase: str) -> None:
        """Progress: ``phase`` says what begins now."""
        self.phase = phase
        self._last_beat = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout_s / 4)):
            waited = time.monotonic() - self._last_beat
            if waited > self._timeout_s:
                print(
                    f"no progress for {waited:.0f} s in: {self.phase}. Stacks of this rank:",
                    file=self._stream,
                    flush=True,
                )
                faulthandler.dump_traceback(file=self._stream, all_threads=True)
                self._stream.flush()
                sys.stdout.flush()
                self._exit(EXIT_RANK_FAILURE)
                return
