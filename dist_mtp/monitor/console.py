"""Rank 0's console: plain aligned lines, the same in a terminal, in a log file and under ``torchrun``, and in a terminal a
progress bar below them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TextIO

from dist_mtp.monitor.depths import by_depth
from dist_mtp.monitor.formatting import compact, duration, fit, percent
from dist_mtp.monitor.other_lines import LinesAboveBar
from dist_mtp.monitor.progress import ProgressBar, is_terminal, shows_bar

RECENT_STEPS = 200
"""Steps whose pace predicts the remaining time: many, as evaluations and checkpoints between them are part of it."""


class Console:
    """Writes each line to ``stream`` and, when ``log_file`` is given, appends it there.

    A reader that goes away (``| head``), a closed terminal or a full disk silences that output and never ends training.

    Args:
        progress: ``monitor.progress``: whether a bar stays at the bottom of ``stream``. The log file never has one.
        clock: seconds.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        log_file: str | Path | None,
        progress: str = "auto",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._clock = stream, clock
        self._bar = ProgressBar(stream, clock) if shows_bar(progress, stream) else None
        self._above_bar: list[LinesAboveBar] = []
        self._outputs: list[TextIO] = [stream]
        self._log: TextIO | None = None
        self._step_ends: deque[float] = deque(maxlen=RECENT_STEPS + 1)
        if log_file is not None:
            Path(log_file).parent.mkdir(parents=True, exist_ok=True)
            self._log = open(log_file, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
            self._outputs.append(self._log)

    def header(self, lines: Iterable[str]) -> None:
        """What this run is, before its first step."""
        for line in lines:
            self._write(line)

    def step_line(self, metrics: Mapping[str, float], total_steps: int) -> None:
        """One line for a trained step; all lines of a run have the same columns."""
        left_s, _ = self._note_step(metrics, total_steps)
        self._write(format_step(metrics, total_steps, left_s))

    def progress(self, metrics: Mapping[str, float], total_steps: int) -> None:
        """A trained step that gets no line of its own: only the bar moves."""
        _, changed = self._note_step(metrics, total_steps)
        if self._bar is not None and changed:
            self._send(self._stream, self._bar.redrawn())

    def eval_line(self, metrics: Mapping[str, float], total_steps: int) -> None:
        """One line for the ``eval_*`` keys of a step's metrics."""
        self._write(format_eval(metrics, total_steps))

    def notice(self, text: str) -> None:
        self._write(text)

    def warn(self, text: str) -> None:
        self._write(f"warning: {text}")

    def put_above_bar(self, stream: TextIO) -> None:
        """Until :meth:`close`, lines that others write to ``stream`` stand above the bar if they reach a terminal, too."""
        bar = self._bar
        if bar is not None and is_terminal(stream):
            others = LinesAboveBar(
                stream, lambda: self._send(self._stream, bar.hidden()), lambda: self._send(self._stream, bar.redrawn())
            )
            self._above_bar.append(others)
            others.start()

    def clear_bar(self) -> None:
        """Remove the bar for good."""
        if self._bar is not None:
            self._send(self._stream, self._bar.hidden())
            self._bar = None
        while self._above_bar:
            self._above_bar.pop().stop()

    def close(self) -> None:
        """Remove the bar and close the log file; the stream belongs to the caller."""
        self.clear_bar()
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()

    def _note_step(self, metrics: Mapping[str, float], total_steps: int) -> tuple[float, bool]:
        """Seconds that are left, and whether the bar has changed.

        The pace is that of the clock: steps alone would leave out evaluations, checkpoints and pictures between them.
        """
        self._step_ends.append(self._clock())
        pauses = len(self._step_ends) - 1
        pace = (self._step_ends[-1] - self._step_ends[0]) / pauses if pauses else metrics["step_time"]
        left_s = (total_steps - metrics["step"]) * pace
        changed = self._bar is not None and self._bar.update(metrics, total_steps, left_s)
        return left_s, changed

    def _write(self, line: str) -> None:
        text = f"{line}\n"
        for output in list(self._outputs):
            bar = self._bar if output is self._stream else None
            self._send(output, text if bar is None else bar.below(text))

    def _send(self, output: TextIO, text: str) -> None:
        """Nothing goes to an output that failed once."""
        write = next((others.write for others in self._above_bar if others.stream is output), output.write)
        if output in self._outputs and not _try_write(output, write, text):
            self._outputs.remove(output)


def format_step(metrics: Mapping[str, float], total_steps: int, left_s: float) -> str:
    """``step   12/300 | loss  5.1234 | main  3.9412 | mtp1  3.9406 | agree  12.3% | grad   1.23 | ...``.

    ``agree`` has one share per MTP depth: positions where that depth's argmax is the main head's. Absent keys show "-".
    """
    depths = by_depth(metrics, "loss_mtp_")
    columns = [
        f"step {_progress(metrics, total_steps)}",
        f"loss {fit(metrics.get('loss'), 7, 4)}",
        *_loss_columns(metrics, ""),
        f"grad {fit(metrics.get('grad_norm'), 6, 2)}",
        f"lr {metrics.get('lr', float('nan')):7.1e}",
        f"{fit(metrics['step_time'], 6, 2)} s",
        f"{compact(metrics['tokens_per_s']):>5} tok/s",
        f"left {duration(left_s):>6}",
    ]
    if depths:
        agree = " ".join(percent(metrics.get(f"accept_mtp_{k}")) for k in range(1, len(depths) + 1))
        columns.insert(3 + len(depths), f"agree {agree}")
    return " | ".join(columns)


def format_eval(metrics: Mapping[str, float], total_steps: int) -> str:
    """``eval  100/300 | main  3.9412 | mtp1  3.9406 | agree  12.3% | 2.1034 bits/byte``; absent parts are left out."""
    columns = [f"eval {_progress(metrics, total_steps)}", *_loss_columns(metrics, "eval_")]
    if accepted := by_depth(metrics, "eval_accept_mtp_"):
        columns.append("agree " + " ".join(map(percent, accepted)))
    if "eval_bits_per_byte" in metrics:
        columns.append(f"{fit(metrics['eval_bits_per_byte'], 7, 4)} bits/byte")
    return " | ".join(columns)


def _progress(metrics: Mapping[str, float], total_steps: int) -> str:
    return f"{metrics['step']:>{max(4, len(str(total_steps)))}d}/{total_steps}"


def _loss_columns(metrics: Mapping[str, float], prefix: str) -> list[str]:
    main = f"main {fit(metrics.get(f'{prefix}loss_main'), 7, 4)}"
    depths = by_depth(metrics, f"{prefix}loss_mtp_")
    return [main, *(f"mtp{k} {fit(loss, 7, 4)}" for k, loss in enumerate(depths, start=1))]


def _try_write(output: TextIO, write: Callable[[str], object], text: str) -> bool:
    """Whether the text got out; ``write`` is the output's."""
    encoding = output.encoding or "utf-8"  # None: an in-memory stream
    try:
        # A path with an accent must not raise under an ASCII locale.
        write(text.encode(encoding, "backslashreplace").decode(encoding))
        output.flush()
    except (OSError, ValueError):  # ValueError: the stream was closed
        _discard_pending(output)
        return False
    return True


def _discard_pending(output: TextIO) -> None:
    """Let the interpreter's last flush of ``output`` succeed: a failing one would turn exit code 0 into 120."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), output.fileno())
