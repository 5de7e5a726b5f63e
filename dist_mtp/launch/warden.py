"""Passes signals to a run's ranks on one machine, for launchers that would not: DeepSpeed's passes on none.

:class:`Wardens` starts one on every host. ``python -m dist_mtp.launch.warden FILE PATIENCE_S`` waits for lines on standard
input: a number is a signal for the ranks that train the configuration ``FILE``, also for those that are only started later;
``over`` says that their launcher has ended. The end of the input means that whoever started this is gone. After either,
ranks that are left are told to stop, and so save a checkpoint, and this program ends with the last of them.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import psutil

from dist_mtp.launch.ranks import RANK_MODULE
from dist_mtp.launch.remote import explain_ssh, ssh_command

OVER = "over"
NODE_LAUNCHER = "deepspeed.launcher.launch"
"""DeepSpeed's process on each node, which starts its ranks."""
LINGER_S = 10.0
"""A launcher whose owner was killed may have been about to start ranks."""
_POLL_S = 0.2
_LATE_S = 30.0
"""For ranks that were killed to be gone, and for ssh to notice a host that is."""


class Wardens:
    """One on each of ``hosts``, or one here if there are none. They outlive this process until the ranks have ended.

    Args:
        file: absolute path of the run's configuration.
        patience_s: see :func:`watch`.
    """

    def __init__(self, hosts: Sequence[str], ssh_config: str | None, file: str, patience_s: float) -> None:
        argv = [sys.executable, "-m", "dist_mtp.launch.warden", file, str(patience_s)]
        self._end_s = patience_s + _LATE_S
        self._hosts = list(hosts) or ["this machine"]
        self._started = [
            subprocess.Popen(
                ssh_command(host, ssh_config, argv) if hosts else argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # an interrupt at the terminal is for this process, which passes it on
            )
            for host in self._hosts
        ]

    def tell(self, line: object) -> None:
        """A signal's number, or :data:`OVER`."""
        for process in self._started:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended
                process.stdin.write(f"{line}\n")
                process.stdin.flush()

    def end(self) -> list[str]:
        """Stop ranks that are left, and wait until there are none; returns what is known of hosts where there may be some."""
        self.tell(OVER)
        deadline = time.monotonic() + self._end_s
        problems = []
        for host, process in zip(self._hosts, self._started, strict=True):
            try:
                _, said = process.communicate(timeout=max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                _, said = process.communicate()
            if process.returncode != 0:
                problems.append(f"ranks may be left on {host}: {explain_ssh(host, process.returncode, said)}")
        return problems


def processes(module: str, file: str) -> list[psutil.Process]:
    """Processes on this machine that run ``python -u -m module`` for the configuration ``file``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if words[1:4] == ["-u", "-m", module] and file in words:
                found.append(process)
    return found


def watch(file: str, patience_s: float, lines: queue.Queue[str | None]) -> None:
    """Do what the lines say, None being their end, until they have ended and nothing is left.

    Args:
        patience_s: ranks that have not ended this long after they should are killed.
    """
    told: set[psutil.Process] = set()
    number: int | None = None
    ends_at: float | None = None  # from then on, nothing left means the end
    kill_at = float("inf")
    while True:
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=None if number is None else _POLL_S)
            if line is None or line == OVER:
                number = signal.SIGTERM if number is None else number
                ends_at = time.monotonic() + (0 if line == OVER else LINGER_S)
            else:
                number, told = int(line), set()
            kill_at = min(kill_at, time.monotonic() + patience_s)
        if number is None:
            continue
        ranks, launchers = processes(RANK_MODULE, file), processes(NODE_LAUNCHER, file)
        now = time.monotonic()
        for process in [*ranks, *launchers]:
            with contextlib.suppress(psutil.Error):
                if now > kill_at:
                    process.kill()
                elif process in ranks and process not in told:
                    process.send_signal(number)
                    told.add(process)
        if ends_at is not None and now >= ends_at and not ranks and not launchers:
            return


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point on a machine."""
    file, patience_s = sys.argv[1:] if argv is None else argv
    # Whoever signals everything at once, a terminal or a batch system, also signals whoever started this.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line.strip())
            if line.strip() == OVER:
                return
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    watch(file, float(patience_s), lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
