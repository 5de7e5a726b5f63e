"""Rank 0's console: plain aligned lines, the same in a terminal, in a log file and under ``torchrun``, and in a terminal a
progress bar below them.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from dist_mtp.monitor.depths import by_depth
from dist_mtp.monitor.formatting import compact, duration, fit, percent
from dist_mtp.monitor.progress import ProgressBar, shows_bar

RECENT_STEPS = 50
"""Steps whose median time predicts the remaining time; the median ignores a step that waited for a checkpoint."""


class Console:
    """Writes each line to ``stream`` and, when ``log_file`` is given, appends it there.

    A reader that goes away (``| head``), a closed terminal or a full disk silences that output and never ends training.

    Args:
        progress: ``monitor.progress``: whether a bar stays at the bottom of ``stream``. The log file never has one.
    """

    def __init__(self, stream: TextIO, *, log_file: str | Path | None, progress: str = "auto") -> None:
        self._stream = stream
        self._bar = ProgressBar(stream) if shows_bar(progress, stream) else None
        self._outputs: list[TextIO] = [stream]
        self._log: TextIO | None = None
        self._step_times: deque[float] = deque(maxlen=RECENT_STEPS)
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
        left_s = self._note_step(metrics, total_steps)
        self._write(format_step(metrics, total_steps, left_s))

    def progress(self, metrics: Mapping[str, float], total_steps: int) -> None:
        """A trained step that gets no line of its own: only the bar moves."""
        self._note_step(metrics, total_steps)
        if self._bar is not None:
            self._send(self._stream, self._bar.redrawn())

    def eval_line(self, metrics: Mapping[str, float], total_steps: int) -> None:
        """One line for the ``eval_*`` keys of a step's metrics."""
        self._write(format_eval(metrics, total_steps))

    def notice(self, text: str) -> None:
        self._write(text)

    def warn(self, text: str) -> None:
        self._write(f"warning: {text}")

    def close(self) -> None:
        """Remove the bar and close the log file; the stream belongs to the caller."""
        if self._bar is not None:
            self._send(self._stream, self._bar.cleared())
            self._bar = None
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()

    def _note_step(self, metrics: Mapping[str, float], total_steps: int) -> float:
        """Seconds that are left."""
        self._step_times.append(metrics["step_time"])
        left_s = (total_steps - metrics["step"]) * statistics.median(self._step_times)
        if self._bar is not None:
            self._bar.update(metrics, total_steps, left_s)
        return left_s

    def _write(self, line: str) -> None:
        text = f"{line}\n"
        for output in list(self._outputs):
            bar = self._bar if output is self._stream else None
            self._send(output, text if bar is None else bar.below(text))

    def _send(self, output: TextIO, text: str) -> None:
        """Nothing goes to an output that failed once."""
        if output in self._outputs and not _try_write(output, text):
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


def _try_write(output: TextIO, text: str) -> bool:
    """Whether the text got out."""
    encoding = output.encoding or "utf-8"  # None: an in-memory stream
    try:
        # A path with an accent must not raise under an ASCII locale.
        output.write(text.encode(encoding, "backslashreplace").decode(encoding))
        output.flush()
    except (OSError, ValueError):  # ValueError: the stream was closed
        _discard_pending(output)
        return False
    return True


def _discard_pending(output: TextIO) -> None:
    """Let the interpreter's last flush of ``output`` succeed: a failing one would turn exit code 0 into 120."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), output.fileno())
