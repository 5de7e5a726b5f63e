"""Two small programs of :mod:`support.hosts`, run by path and with the standard library only.

``init NAME HOSTS_FILE`` is the first process of a host: it makes the place a host and ends it when its standard input ends,
that is when the test process ends, however that happens. The kernel then kills every other process of the host.

``enter PID ARGV...`` runs a program on the host whose first process is PID, passes signals on to it, and ends as it ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from typing import NoReturn

NAMESPACES = ("net", "uts", "pid", "mnt")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def set_namespace(pid: int | str, kind: str) -> None:
    """Move this process (for ``pid``: its later children) into a namespace of another process."""
    with open(f"/proc/{pid}/ns/{kind}") as file:
        if _LIBC.setns(file.fileno(), 0) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"setns to the {kind} namespace of {pid}: {os.strerror(error)}")


def init(name: str, hosts_file: str) -> NoReturn:
    """Own name, ``/etc/hosts``, ``/run`` and ``/sys``; then stay, and bury processes that have lost their parent."""
    for command in (
        ["hostname", name],
        ["mount", "--bind", hosts_file, "/etc/hosts"],
        ["mount", "-t", "tmpfs", "tmpfs", "/run"],
        ["mount", "-t", "sysfs", "sysfs", "/sys"],  # it shows the network devices of where it was mounted
        ["ip", "link", "set", "lo", "up"],
    ):
        subprocess.run(command, check=True)
    threading.Thread(target=_end_with_input, daemon=True).start()
    print("ready", flush=True)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.2)


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def enter(pid: str, argv: list[str]) -> NoReturn:
    """Run ``argv`` there, in the same working folder."""
    folder = os.getcwd()
    for kind in NAMESPACES:
        set_namespace(pid, kind)
    os.chdir(folder)  # a new view of the file system begins at its root
    passed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # until there is somebody to pass them to
    child = os.fork()
    if child == 0:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
        os.execvp(argv[0], argv)
    for number in passed_on:
        signal.signal(number, lambda received, frame: os.kill(child, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:  # end by the same signal
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "init":
        init(*sys.argv[2:])
    enter(sys.argv[2], sys.argv[3:])
