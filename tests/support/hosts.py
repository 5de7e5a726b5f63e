"""Several hosts on one machine, joined by a network with a bandwidth, a latency and cables that can be pulled.

A host is a set of Linux namespaces: its own network, host name, processes (so that ``pkill`` on one host ends nothing on
another), ``/etc/hosts`` and ``/run``. Files are shared, as on a cluster. Needs root and ``/dev/net/tun``::

    with Hosts(2, rate_mbit=100, latency_ms=5) as cluster:
        subprocess.run(cluster.hosts[0].command(["ping", "-c", "1", "node1"]))
        cluster.cut(cluster.hosts[1])

Hosts end, with everything that runs on them, when the block or the test process does, however that happens.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
NETWORK = "10.77.0"
"""First three bytes of all addresses; no host but ours sees them."""
READY_S = 20.0
_SSHD = "/usr/sbin/sshd"


def unavailable(*programs: str) -> str | None:
    """Why hosts cannot be made here; None if they can.

    Args:
        programs: that a test needs besides, such as ``pdsh``.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    missing = [name for name in ("ip", "unshare", "hostname", *programs) if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
        subprocess.run([*_new_namespaces(), "true"], check=True, capture_output=True, timeout=READY_S)
    except OSError as error:
        return f"no network devices can be made: {error}"
    except subprocess.SubprocessError as error:
        return f"no namespaces can be made: {error}"
    return None


def needs_sshd() -> str | None:
    """Why no sshd can run on hosts; None if it can."""
    return unavailable("ssh", "ssh-keygen") or (None if Path(_SSHD).exists() else "not installed: openssh-server")


def _new_namespaces() -> list[str]:
    return ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


@dataclass(frozen=True)
class Host:
    """One host."""

    number: int
    name: str
    address: str
    pid: int
    """Of its first process, as the test process sees it."""

    def command(self, argv: Sequence[str]) -> list[str]:
        """What runs ``argv`` on this host in the caller's folder; signals and exit codes pass through."""
        return [sys.executable, "-I", str(HERE / "host_process.py"), "enter", str(self.pid), *argv]

    def processes(self) -> list[int]:
        """Processes on this host other than what makes it a host (its first one, and sshd), as the test process sees them."""
        home, found = _namespace(self.pid), []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.pid:
                continue
            with contextlib.suppress(OSError):
                if _namespace(int(entry.name)) != home or (entry / "comm").read_text().startswith("sshd"):
                    continue
                # The last word before the numbers is the state; a dead process waits for its parent as Z.
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(entry.name))
        return sorted(found)


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")


class Hosts:
    """``count`` hosts named ``node0``, ``node1``, ... that know each other's names.

    Args:
        rate_mbit: of each host's cable, in 10^6 bits per second and direction; None is as fast as it goes.
        latency_ms: from one host to another, one way.
        own_name: ``loopback`` lets a host's own name resolve to 127.0.1.1, as Debian's installer sets it up.
    """

    def __init__(
        self, count: int, *, rate_mbit: float | None = None, latency_ms: float = 0.0, own_name: str = "address"
    ) -> None:
        self.hosts: list[Host] = []
        self.ssh_config = Path()
        """File for ``ssh -F`` on any host, once :meth:`start_sshd` has run."""
        self._count, self._rate_mbit, self._latency_ms, self._own_name = count, rate_mbit, latency_ms, own_name
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Hosts:
        with contextlib.ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
            for number in range(self._count):
                self.hosts.append(self._start_host(stack, number))
            self._link = self._start_link(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def cut(self, host: Host, other: Host | None = None) -> None:
        """Pull the cable: packets between ``host`` and ``other``, or all others, are lost without a word."""
        self._tell("cut", host, other)

    def restore(self, host: Host, other: Host | None = None) -> None:
        """Plug it in again."""
        self._tell("restore", host, other)

    def start_sshd(self) -> Path:
        """Start sshd on port 22 of every host, with host keys of its own, for root with a key of this network.

        Returns:
            :attr:`ssh_config`: names, key and known host keys; checks host keys, asks nobody for passwords.
        """
        folder = self._folder
        key = _make_key(folder / "key")
        (folder / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
        known = ""
        for host in self.hosts:
            host_key = _make_key(folder / f"{host.name}_key")
            known += f"{host.name},{host.address} {host_key.with_suffix('.pub').read_text()}"
            options = {
                "Port": "22",
                "HostKey": str(host_key),
                "AuthorizedKeysFile": str(folder / "authorized_keys"),
                "AuthenticationMethods": "publickey",
                "PermitRootLogin": "prohibit-password",
                "StrictModes": "no",  # it refuses folders below /tmp
                "UsePAM": "no",
                "UseDNS": "no",
                "PidFile": "none",
            }
            (folder / f"{host.name}_sshd").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
            start = f"mkdir -p /run/sshd && exec {_SSHD} -D -e -f {folder / f'{host.name}_sshd'}"
            log = self._stack.enter_context((folder / f"{host.name}_sshd.log").open("w"))
            process = subprocess.Popen(
                host.command(["sh", "-c", start]), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            self._stack.callback(_end, process)
        (folder / "known_hosts").write_text(known)
        self.ssh_config = folder / "ssh_config"
        self.ssh_config.write_text(
            f"Host *\n  User root\n  IdentityFile {key}\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder / 'known_hosts'}\n"
            "  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n  BatchMode yes\n  LogLevel ERROR\n"
        )
        for host in self.hosts:
            self._await_sshd(host)
        return self.ssh_config

    def _start_host(self, stack: contextlib.ExitStack, number: int) -> Host:
        names = [(f"{NETWORK}.{other + 1}", f"node{other}") for other in range(self._count)]
        if self._own_name == "loopback":
            names[number] = ("127.0.1.1", f"node{number}")
        file = self._folder / f"node{number}_hosts"
        file.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for address, name in names))
        program = [sys.executable, "-I", str(HERE / "host_process.py"), "init", f"node{number}", str(file)]
        process = stack.enter_context(_lifelined([*_new_namespaces(), *program]))
        _await_word(process, "ready")
        # unshare's only child: the first process of the new namespace.
        first = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        return Host(number, f"node{number}", f"{NETWORK}.{number + 1}", first)

    def _start_link(self, stack: contextlib.ExitStack) -> subprocess.Popen[str]:
        rate = "none" if self._rate_mbit is None else f"{self._rate_mbit:g}"
        ends = [f"{host.pid}={host.address}" for host in self.hosts]
        program = [sys.executable, "-I", str(HERE / "link.py"), rate, f"{self._latency_ms:g}", *ends]
        process = stack.enter_context(_lifelined(program))
        _await_word(process, "ready")
        return process

    def _tell(self, word: str, host: Host, other: Host | None) -> None:
        others = self.hosts if other is None else [other]
        for end in others:
            if end is not host:
                _stream(self._link.stdin).write(f"{word} {host.number} {end.number}\n")
                _stream(self._link.stdin).flush()
                _await_word(self._link, "done")

    def _await_sshd(self, host: Host) -> None:
        command = host.command(["ssh", "-F", str(self.ssh_config), host.name, "true"])
        deadline = time.monotonic() + READY_S
        while (tried := subprocess.run(command, capture_output=True, text=True)).returncode != 0:
            if time.monotonic() > deadline:
                log = (self._folder / f"{host.name}_sshd.log").read_text()
                raise RuntimeError(f"sshd of {host.name} cannot be reached: {tried.stderr}\n{log}")
            time.sleep(0.1)


def watch_empty(hosts: Sequence[Host], timeout_s: float, besides: Collection[int] = ()) -> dict[str, list[str]]:
    """Command lines of processes that are still on hosts after ``timeout_s`` seconds; returns at once when there are none.

    Args:
        besides: processes that may stay.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left = {host.name: [_command_line(pid) for pid in host.processes() if pid not in besides] for host in hosts}
        left = {name: lines for name, lines in left.items() if lines}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def kill_all(hosts: Sequence[Host], besides: Collection[int] = ()) -> None:
    """Kill all processes on hosts."""
    for host in hosts:
        for pid in set(host.processes()).difference(besides):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return "(ended)"


@contextlib.contextmanager
def _lifelined(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A program that ends with its standard input, and so with this process."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        _stream(process.stdin).close()
        _end(process)
        _stream(process.stdout).close()


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(0 if process.stdin is None else READY_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _await_word(process: subprocess.Popen[str], word: str) -> None:
    line = _stream(process.stdout).readline().strip()
    if line != word:
        raise RuntimeError(f"{process.args} ended with exit code {process.wait(READY_S)} instead of saying {word!r}")


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _make_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path
