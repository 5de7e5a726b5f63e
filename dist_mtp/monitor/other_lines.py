"""Lines of other code on standard output or error, kept apart from a progress bar on the same terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TextIO


class LinesAboveBar:
    """Between :meth:`start` and :meth:`stop`, whole lines written to ``stream`` come out where the bar stood.

    Args:
        hide: removes the bar from the terminal, by :attr:`write` if the bar is on the same stream.
        show: draws it again, below.
    """

    def __init__(self, stream: TextIO, hide: Callable[[], None], show: Callable[[], None]) -> None:
        self.stream: Any = stream
        self.write = stream.write
        """The stream's own, past the bar."""
        self._hide, self._show = hide, show
        self._begun = ""

    def start(self) -> None:
        # The stream's own method and not sys.stdout is replaced: log handlers made at import, as DeepSpeed's, keep the
        # stream itself.
        self.stream.write = self._write_lines

    def stop(self) -> None:
        """Write what has no newline yet, too."""
        del self.stream.write
        begun, self._begun = self._begun, ""
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            self.write(begun)

    def _write_lines(self, text: str) -> int:
        lines, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            self._hide()
            try:
                self.write(lines + newline)
                self.stream.flush()
            finally:
                self._show()
        return len(text)
