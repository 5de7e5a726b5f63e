"""The line at the bottom of a terminal: ``step 12/300 ━━━━╸──── 4% loss 3.9412 3.9k tok/s ETA 2m30s``.

rich draws it and the console writes it, together with the lines above: no thread, no signal handler, no hidden cursor, and
one place where a broken terminal is noticed.
"""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from dist_mtp.monitor.formatting import compact, duration, fit

ERASE = "\r\x1b[2K"
"""To the start of the line, and clear it."""
REDRAW_S = 0.1
"""Least time between two states of the bar: nobody reads faster, and drawing one takes rich about a millisecond."""
_COLUMNS = 80
"""Of a terminal that does not say how wide it is."""


def shows_bar(progress: str, stream: TextIO) -> bool:
    """Whether ``monitor.progress`` asks for a bar on this stream. A terminal that cannot clear a line has none."""
    if progress == "lines" or os.environ.get("TERM") == "dumb":
        return False
    return progress == "bar" or is_terminal(stream)


def is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


class ProgressBar:
    """Remembers what the bottom line shows, so that lines can be put above it."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._shown = ""
        self._drawn_at = -math.inf

    def update(self, metrics: Mapping[str, float], total_steps: int, left_s: float) -> bool:
        """A step was trained. Returns whether the bar has changed: it does so once in :data:`REDRAW_S`, and at the end."""
        now = self._clock()
        if now - self._drawn_at < REDRAW_S and metrics["step"] < total_steps:
            return False
        self._drawn_at = now
        self._shown = self._draw(metrics, total_steps, left_s)
        return True

    def redrawn(self) -> str:
        """What replaces the bottom line by its new state."""
        return ERASE + self._shown if self._shown else ""

    def below(self, lines: str) -> str:
        """What puts ``lines``, which end in a newline, above the bottom line."""
        return f"{ERASE}{lines}{self._shown}" if self._shown else lines

    def hidden(self) -> str:
        """What removes the bottom line, until it is redrawn."""
        return ERASE if self._shown else ""

    def _draw(self, metrics: Mapping[str, float], total_steps: int, left_s: float) -> str:
        from rich.console import Console
        from rich.progress_bar import ProgressBar as Bar
        from rich.table import Column, Table

        # rich chooses characters by the encoding, and NO_COLOR and TERM decide about colours.
        drawn = io.TextIOWrapper(io.BytesIO(), encoding=self._stream.encoding or "utf-8", newline="")
        # One column less than there are: a full line would wrap on some terminals, and \r return to its last part only.
        console = Console(
            file=drawn, force_terminal=True, width=max(_columns(self._stream) - 1, 1), legacy_windows=False
        )
        texts = (
            f"{metrics['step'] / max(total_steps, 1):4.0%}",
            f"loss {fit(metrics.get('loss'), 7, 4)}",
            f"{compact(metrics['tokens_per_s']):>5} tok/s",
            f"ETA {duration(left_s):>6}",
        )
        fixed = [Column(no_wrap=True, overflow="crop") for _ in texts]
        table = Table.grid(Column(no_wrap=True, overflow="crop"), Column(ratio=1), *fixed, padding=(0, 1), expand=True)
        table.add_row(
            f"step {metrics['step']:>{len(str(total_steps))}d}/{total_steps}",
            Bar(total=max(total_steps, 1), completed=metrics["step"]),
            *texts,
        )
        console.print(table, end="")
        drawn.seek(0)
        return drawn.read().splitlines()[0]


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except (OSError, ValueError):  # no terminal, or closed
        return _COLUMNS
