"""Console lines stand in columns, and an output that breaks never ends training."""

import fcntl
import io
import logging
import math
import os
import re
import select
import struct
import subprocess
import sys
import termios

import pytest

from dist_mtp.monitor import formatting
from dist_mtp.monitor.console import Console

TOTAL_STEPS = 300


def metrics(step, loss=3.9412, num_depths=2, **others):
    row = {
        "step": step, "loss": loss, "loss_main": loss, "grad_norm": loss, "lr": 2.2e-4,
        "step_time": 0.52, "tokens_per_s": 3938.5,
    }  # fmt: skip
    for depth in range(1, num_depths + 1):
        row |= {f"loss_mtp_{depth}": loss, f"accept_mtp_{depth}": min(loss / 12.3, 1.0)}
    return row | others


class Clock:
    """Shows the time that it is set to."""

    now = 0.0

    def __call__(self):
        return self.now


def step_lines(rows):
    """Lines of steps that follow each other without a pause."""
    stream, clock = io.StringIO(), Clock()
    console = Console(stream, log_file=None, clock=clock)
    for row in rows:
        clock.now += row["step_time"]
        console.step_line(row, TOTAL_STEPS)
    return stream.getvalue().splitlines()


def bars(line):
    return [column for column, character in enumerate(line) if character == "|"]


@pytest.mark.parametrize("num_depths", [0, 1, 3])
def test_step_lines_are_aligned(num_depths):
    """All lines of a run are equally long with "|" in the same columns, whatever the numbers are."""
    losses = [12.3 * (0.0001 / 12.3) ** (step / TOTAL_STEPS) for step in range(TOTAL_STEPS)]
    rows = [metrics(step, loss, num_depths) for step, loss in enumerate(losses, start=1)]
    odd = {"step_time": 1234.5, "tokens_per_s": 0.03, "accept_mtp_1": 1.0}
    rows += [metrics(5, loss, num_depths, **odd) for loss in (math.nan, math.inf, -0.5, 123.456, 1e5, 3e12)]
    lines = step_lines(rows)
    assert len(lines) == len(rows), f"{len(lines)} lines for {len(rows)} rows"
    for line in lines:
        assert (len(line), bars(line)) == (len(lines[0]), bars(lines[0])), f"not aligned:\n{lines[0]}\n{line}"


def test_step_line_shows_every_depth():
    """The line holds each value with its unit, every MTP depth, and the time left at this pace."""
    (line,) = step_lines([metrics(12, accept_mtp_1=0.123, accept_mtp_2=0.045)])
    expected = (
        "step   12/300 | loss  3.9412 | main  3.9412 | mtp1  3.9412 | mtp2  3.9412 | agree  12.3%   4.5% | "
        "grad   3.94 | lr 2.2e-04 |   0.52 s |  3.9k tok/s | left  2m30s"
    )
    assert line == expected, f"\n{line}\n{expected}"


def test_time_left_is_that_of_the_clock():
    """Steps of 1 s with an evaluation of 8 s after every second one: 100 of them take 500 s and not 100 s."""
    stream, clock = io.StringIO(), Clock()
    console = Console(stream, log_file=None, clock=clock)
    for step in range(1, 202):
        clock.now += 1 if step % 2 else 9
        console.step_line(metrics(step, step_time=1.0), 301)
    last = stream.getvalue().splitlines()[-1]
    assert last.endswith("left  8m20s"), last


def test_absent_metrics_keep_the_columns():
    """A step without a gradient norm or agreement shows "-" there and moves nothing."""
    bare = metrics(2)
    for key in ("grad_norm", "lr", "accept_mtp_1", "accept_mtp_2"):
        del bare[key]
    full, line = step_lines([metrics(1), bare])
    assert bars(line) == bars(full), f"\n{full}\n{line}"
    assert "agree      -      -" in line, line


def test_eval_line():
    """An evaluation shows its own keys, not those of the training step it stands beside."""
    stream = io.StringIO()
    row = metrics(100, 9.9) | {"eval_loss_main": 3.5, "eval_loss_mtp_1": 3.75, "eval_accept_mtp_1": 0.125}
    Console(stream, log_file=None).eval_line(row | {"eval_bits_per_byte": 2.25}, TOTAL_STEPS)
    expected = "eval  100/300 | main  3.5000 | mtp1  3.7500 | agree  12.5% |  2.2500 bits/byte\n"
    assert stream.getvalue() == expected, f"\n{stream.getvalue()}{expected}"


def test_log_file_gets_the_same_lines(tmp_path):
    """Who reads the log later sees what stood on the screen; a resumed run appends."""
    stream = io.StringIO()
    for text in ("first", "resumed"):
        console = Console(stream, log_file=tmp_path / "logs" / "console.log")
        console.header([text, "settings"])
        console.warn("slow disk")
        console.step_line(metrics(1), TOTAL_STEPS)
        console.close()
    log = (tmp_path / "logs" / "console.log").read_text()
    assert log == stream.getvalue(), f"\n{log}\n{stream.getvalue()}"
    assert "resumed\nsettings\nwarning: slow disk\nstep" in log, log


def test_broken_stream_leaves_the_log(tmp_path):
    """When the terminal goes away, lines still reach the log file and nothing is raised."""
    stream = io.StringIO()
    console = Console(stream, log_file=tmp_path / "console.log")
    stream.close()
    console.notice("one")
    console.notice("two")
    console.close()
    log = (tmp_path / "console.log").read_text()
    assert log == "one\ntwo\n", log


def test_closed_pipe_keeps_exit_code_zero(tmp_path):
    """`dist-mtp train | head` exits 0: the interpreter's last flush of a broken stdout would make it 120."""
    code = (
        "import sys; from dist_mtp.monitor.console import Console; c = Console(sys.stdout, log_file=sys.argv[1])\n"
        "for i in range(3): c.notice(str(i))"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    # Only a buffered stdout has something left to flush at exit.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60, env=env, check=False
    )
    os.close(write_end)
    log = (tmp_path / "log").read_text()
    assert (done.returncode, done.stderr) == (0, ""), f"exit code {done.returncode}: {done.stderr}"
    assert log == "0\n1\n2\n", log


def test_ascii_terminal_does_not_silence_the_console():
    """A path with an accent is written with escapes where the locale cannot show it."""
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, encoding="ascii"), log_file=None)
    console.notice("runs/é")
    console.notice("next")
    assert raw.getvalue() == b"runs/\\xe9\nnext\n", raw.getvalue()


class Terminal:
    """A pseudo-terminal: ``stream`` is its slave side, as a process that was started in it has it."""

    def __init__(self, columns):
        self.master, slave = os.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[1] &= ~termios.OPOST  # newlines arrive as they were written
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.sent = ""

    def screen(self):
        """Lines that stand there, colours left out."""
        self.sent += self.received()
        text = re.sub(r"\x1b\[[\d;]*m", "", self.sent)
        # "\r" and "erase line" is all that a bar needs; anything else would stay in the text and be noticed.
        return [line.rpartition("\r\x1b[2K")[2] for line in text.split("\n")]

    def received(self):
        """Characters that were written since the last call; the kernel passes them on in pieces, and a little later."""
        os.write(self.stream.fileno(), b"\0")  # nothing else writes one, so it is the end
        text = b""
        while not text.endswith(b"\0"):
            assert select.select([self.master], [], [], 10.0)[0], f"only {text!r} came"
            text += os.read(self.master, 1 << 20)
        return text[:-1].decode()

    def hang_up(self):
        if self.master >= 0:
            os.close(self.master)
        self.master = -1


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    opened = Terminal(columns=100)
    yield opened
    opened.stream.close()
    opened.hang_up()


class TestProgressBar:
    """In a terminal the bar is the last line, under the same lines as elsewhere; no other output ever sees it."""

    def test_stays_below_the_lines(self, terminal, tmp_path):
        """Whatever is written goes above; log file and screen end up with the same lines."""
        clock = Clock()
        console = Console(terminal.stream, log_file=tmp_path / "log", clock=clock)
        console.header(["settings"])
        for step in (1, 2):
            clock.now += 0.52
            console.step_line(metrics(step), TOTAL_STEPS)
        clock.now += 0.52
        console.progress(metrics(150), TOTAL_STEPS)
        console.warn("slow disk")
        *lines, bar = terminal.screen()
        expected = step_lines([metrics(1), metrics(2)])
        assert lines == ["settings", *expected, "warning: slow disk"], lines
        found = re.fullmatch(r"step 150/300 (━+╸?[━╺]*)  50% loss  3\.9412  3\.9k tok/s ETA  1m18s", bar)
        assert found, bar
        assert len(bar) == 99, f"{len(bar)} of 100 columns: one is left free, so that no terminal wraps the line"
        console.close()
        assert terminal.screen() == [*lines, ""], "the bar is still there"
        log = (tmp_path / "log").read_text()
        assert log.splitlines() == lines, log
        assert "\x1b" not in log
        assert "\r" not in log

    @pytest.mark.parametrize(
        ("progress", "term", "is_terminal", "expected"),
        [
            ("auto", "xterm", True, True),
            ("auto", "xterm", False, False),
            ("auto", "dumb", True, False),
            ("lines", "xterm", True, False),
            ("bar", "xterm", False, True),
            ("bar", "dumb", False, False),
        ],
    )
    def test_is_shown_where_asked_for(self, progress, term, is_terminal, expected, terminal, monkeypatch):
        monkeypatch.setenv("TERM", term)
        stream = terminal.stream if is_terminal else io.StringIO()
        Console(stream, log_file=None, progress=progress).step_line(metrics(1), TOTAL_STEPS)
        text = terminal.received() if is_terminal else stream.getvalue()
        assert ("ETA" in text) == expected, repr(text)
        assert expected or text.splitlines() == step_lines([metrics(1)]), repr(text)

    def test_moves_ten_times_a_second(self, monkeypatch):
        """Steps of 10 ms do not draw it a hundred times; lines are all there, and the last step is shown in any case."""
        monkeypatch.setenv("TERM", "xterm")
        stream, clock = io.StringIO(), Clock()
        console = Console(stream, log_file=None, progress="bar", clock=clock)
        for step in range(1, 96):
            clock.now = step / 100
            show = console.step_line if step % 50 == 0 else console.progress
            show(metrics(step), 95)
        text = stream.getvalue()
        drawn = [int(step) for step in re.findall(r"step +(\d+)/95 (?!\|)", re.sub(r"\x1b\[[\d;]*m", "", text))]
        assert len(drawn) <= 10 + 2, f"{len(drawn)} in 0.95 s: {drawn}"
        assert drawn[-1] == 95, drawn
        assert re.findall(r"step +(\d+)/95 +\|", text) == ["50"], text

    def test_other_lines_stand_above(self, terminal, monkeypatch):
        """What Python code writes to the terminal, in pieces or by a log handler made at import, is never beside the bar."""
        stderr = os.fdopen(os.dup(terminal.stream.fileno()), "w", encoding="utf-8")
        monkeypatch.setattr(sys, "stderr", stderr)
        handler = logging.StreamHandler(terminal.stream)
        console = Console(terminal.stream, log_file=None)
        for stream in (terminal.stream, sys.stderr):
            console.put_above_bar(stream)
        console.step_line(metrics(1), TOTAL_STEPS)
        print("a long warning", 1, file=sys.stderr)
        handler.emit(logging.makeLogRecord({"msg": "logged"}))
        sys.stderr.write("begun")
        *lines, bar = terminal.screen()
        assert lines == [*step_lines([metrics(1)]), "a long warning 1", "logged"], lines
        assert "ETA" in bar, bar
        console.close()
        print(" and ended", file=sys.stderr)
        stderr.flush()
        assert terminal.screen() == [*lines, "begun and ended", ""], terminal.screen()
        stderr.close()

    def test_leaves_a_redirected_stderr_alone(self, terminal, tmp_path):
        with open(tmp_path / "errors", "w") as errors:
            console = Console(terminal.stream, log_file=None)
            console.put_above_bar(errors)
            console.step_line(metrics(1), TOTAL_STEPS)
            print("warning", file=errors)
            console.close()
        assert (tmp_path / "errors").read_text() == "warning\n"

    def test_has_no_colours_when_asked(self, terminal, monkeypatch):
        monkeypatch.setenv("NO_COLOR", "1")
        Console(terminal.stream, log_file=None).step_line(metrics(1), TOTAL_STEPS)
        text = terminal.received()
        assert "ETA" in text, repr(text)
        assert "\x1b" not in text.replace("\r\x1b[2K", ""), repr(text)

    def test_fits_a_narrow_terminal(self, terminal):
        """One line, cut at the edge; a second one could not be erased."""
        fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
        clock = Clock()
        console = Console(terminal.stream, log_file=None, clock=clock)
        for step in (1, 2):
            clock.now += 0.52
            console.step_line(metrics(step), TOTAL_STEPS)
        *lines, bar = terminal.screen()
        assert lines == step_lines([metrics(1), metrics(2)]), lines
        assert len(bar) <= 19, bar

    def test_ends_with_the_terminal(self, terminal, tmp_path):
        """The window is closed: training goes on, and the log has every line."""
        console = Console(terminal.stream, log_file=tmp_path / "log")
        console.step_line(metrics(1), TOTAL_STEPS)
        terminal.hang_up()
        console.progress(metrics(2), TOTAL_STEPS)
        console.step_line(metrics(3), TOTAL_STEPS)
        console.close()
        log = (tmp_path / "log").read_text()
        assert [line.split()[1] for line in log.splitlines()] == ["1/300", "3/300"], log

    def test_ends_with_the_stream(self, monkeypatch):
        """A bar on a closed stream is as silent as lines are, whenever it was closed."""
        monkeypatch.setenv("TERM", "xterm")
        closed = io.StringIO()
        closed.close()
        Console(closed, log_file=None).notice("one")
        stream = io.StringIO()
        console = Console(stream, log_file=None, progress="bar")
        console.progress(metrics(1), TOTAL_STEPS)
        stream.close()
        for step in (2, 3):
            console.progress(metrics(step), TOTAL_STEPS)
        console.close()

    def test_costs_nothing_without_a_terminal(self):
        """rich is not even imported where lines are written."""
        code = (
            "import io, sys; from dist_mtp.monitor.console import Console\n"
            "Console(io.StringIO(), log_file=None).step_line({'step': 1, 'step_time': 1, 'tokens_per_s': 1}, 2)\n"
            "print('rich' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "False\n", done.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formatting.compact(999.4), "999"),
        (formatting.compact(999.6), "1.0k"),
        (formatting.compact(99_960), "100k"),
        (formatting.compact(2.5e15), "2500T"),
        (formatting.duration(59.6), "1m00s"),
        (formatting.duration(3599.7), "1h00m"),
        (formatting.duration(math.nan), "-"),
        (formatting.fit(9_999_999.6, 6, 2), " 1e+07"),
    ],
)
def test_rounding_never_makes_a_sixtieth_second_or_a_thousandth(text, expected):
    """Rounding happens before the unit is chosen: "60s", "1000.0" and lost columns must not appear."""
    assert text == expected, f"{text!r}, expected {expected!r}"
