"""Real runs as their user sees them: a bar below the lines in a terminal, and plain lines everywhere else."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest
from support import launches

from dist_mtp.errors import EXIT_DIVERGED

COLUMNS = 120
TIMEOUT_S = 120.0
ERASE = "\r\x1b[2K"
STEPS = 6


def in_terminal(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit code of a run in ``folder``, and every character that the terminal was sent."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**env, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    os.close(slave)
    sent, deadline = b"", time.monotonic() + TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            if not select.select([master], [], [], 1.0)[0]:
                continue
            try:
                sent += os.read(master, 1 << 16)
            except OSError:  # EIO: nobody has the terminal open any more
                break
        code = process.wait(max(1.0, deadline - time.monotonic()))
    finally:
        for pid in launches.processes_of(folder):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        os.close(master)
    return code, sent.decode().replace("\r\n", "\n")


def screen(sent: str) -> list[str]:
    """Lines that stand there in the end, colours left out."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", sent)
    return [line.rpartition(ERASE)[2] for line in plain.split("\n")]


def command(folder: Path, run: str, *more: str) -> list[str]:
    common = (f"train.steps={STEPS}", "monitor.log_every=3", "parallel.pp=2", "checkpoint.every=2")
    return launches.dist_mtp(*launches.overrides(folder, run, *common, *more))


def test_bar_of_two_ranks(tmp_path: Path) -> None:
    """It shows every step, steps without a line too, never touches a line, and is gone in the end; each rank has its log."""
    # More microbatches than needed: steps that follow each other within a tenth of a second share a state of the bar.
    code, sent = in_terminal(command(tmp_path, "run", "train.micro_batches=16"), tmp_path / "run")
    assert code == 0, sent
    bars = re.findall(r"step (\d)/6 .*?ETA +(\d+s)", re.sub(r"\x1b\[[\d;]*m", "", sent))
    assert {int(step) for step, _ in bars} == set(range(1, STEPS + 1)), bars
    shown, log = screen(sent), (tmp_path / "run" / "logs" / "rank_0.log").read_text().splitlines()
    assert not [line for line in shown if "ETA" in line or "\x1b" in line or "\r" in line], sent
    start = shown.index(log[0])
    assert shown[start : start + len(log)] == log, "\n".join([*shown, "--- log", *log])
    assert [line.split()[1] for line in log if line.startswith("step ")] == ["3/6", "6/6"], log
    assert any(line.startswith("checkpoint ") for line in log), log
    assert (tmp_path / "run" / "logs" / "rank_1.log").exists(), "each rank has a log"


@pytest.mark.parametrize("launcher", ["none", "local"])
def test_bar_is_gone_when_a_run_fails(launcher: str, tmp_path: Path) -> None:
    """The loss is not finite at the second step: what is said about it stands in lines of its own, and no bar is left."""
    alone = (
        f"launcher={launcher}",
        f"parallel.pp={1 if launcher == 'none' else 2}",
        "optim.lr=1e30",
        "optim.warmup_steps=0",
    )
    code, sent = in_terminal(command(tmp_path, "run", *alone), tmp_path / "run")
    assert code == EXIT_DIVERGED, sent
    assert re.search(r"step \d/6 .*ETA", re.sub(r"\x1b\[[\d;]*m", "", sent)), f"there was no bar: {sent!r}"
    shown = screen(sent)
    assert not [line for line in shown if "ETA" in line or "\x1b" in line or "\r" in line], shown
    errors = [line for line in shown if "the update was not applied" in line]
    assert errors, shown
    assert all(line.startswith(("error: step ", "step ", "rank ", "  ")) for line in errors), errors


@pytest.mark.parametrize("where", ["terminal", "pipe"])
def test_lines_have_no_escapes(where: str, tmp_path: Path) -> None:
    """As ``monitor.progress=lines`` asks in a terminal, and by itself in a pipe."""
    alone = ("launcher=none", "parallel.pp=1")
    if where == "terminal":
        code, sent = in_terminal(command(tmp_path, "run", "monitor.progress=lines", *alone), tmp_path / "run")
    else:
        ended = launches.train(command(tmp_path, "run", *alone), tmp_path / "run")
        code, sent = ended.code, ended.output
    assert code == 0, sent
    assert "step    3/6" in sent, sent
    assert "\x1b" not in sent, repr(sent)
    assert "\r" not in sent, repr(sent)
