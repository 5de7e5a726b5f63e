"""The network between the hosts of :mod:`support.hosts`: a program that forwards their packets, late and not too fast.

Usage: ``link.py RATE_MBIT|none LATENCY_MS PID=ADDRESS...``, one ``PID=ADDRESS`` per host, PID of its first process. Each
host gets a TUN device ``eth0`` with that address. Standard input takes lines ``cut I J`` and ``restore I J`` (numbers of
hosts), answered by ``done``; its end ends the program, and the devices go with it.

``tc`` would do the same in the kernel, but its ``netem``, the part that delays, is missing from many; here the link is the
same everywhere.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(__file__))  # run by path
from host_process import set_namespace

DEVICE = "eth0"
MTU = 9000
"""Bytes; what data centres use, and fewer packets for an interpreter to carry."""
BACKLOG_S = 0.02
"""Of packets that one host may have on their way into its cable; more wait in its device, which drops them when full."""
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def open_device(pid: str, address: str) -> int:
    """Make ``eth0`` on a host; returns the file of its packets."""
    set_namespace(pid, "net")
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    for command in (
        ["ip", "link", "set", DEVICE, "addrgenmode", "none"],  # no IPv6
        ["ip", "address", "add", f"{address}/24", "dev", DEVICE],
        ["ip", "link", "set", DEVICE, "mtu", str(MTU), "up"],
    ):
        subprocess.run(command, check=True)
    return file


class Link:
    """Every host has a cable of ``rate_mbit`` to a switch; a packet arrives ``latency_s`` after it has left.

    Args:
        files: of each host's packets.
        addresses: of each host, packed.
    """

    def __init__(
        self, files: Sequence[int], addresses: Sequence[bytes], rate_mbit: float | None, latency_s: float
    ) -> None:
        self._files, self._latency_s = list(files), latency_s
        self._host_of = {address: host for host, address in enumerate(addresses)}
        self._seconds_per_byte = 0.0 if rate_mbit is None else 8 / (rate_mbit * 1e6)
        self._cut: set[frozenset[int]] = set()
        self._free_at = [0.0] * len(files)
        """When each host's cable has sent all it was given."""
        self._on_the_way: list[collections.deque[tuple[float, int, bytes]]] = [collections.deque() for _ in files]
        """By sender: when it arrives, at whom, and the packet."""

    def command(self, line: str) -> None:
        word, *hosts = line.split()
        edge = frozenset(map(int, hosts))
        if word == "cut":
            self._cut.add(edge)
        else:
            self._cut.discard(edge)

    def run(self) -> None:
        """Forward until standard input ends."""
        while True:
            now = time.monotonic()
            arrivals = [queue[0][0] for queue in self._on_the_way if queue]
            ready_to_send = [f for f, free in zip(self._files, self._free_at, strict=True) if free < now + BACKLOG_S]
            if len(ready_to_send) < len(self._files):
                arrivals.append(now + BACKLOG_S / 4)
            wait_s = max(0.0, min(arrivals) - now) if arrivals else None
            readable, _, _ = select.select([sys.stdin, *ready_to_send], [], [], wait_s)
            for file in readable:
                if file is sys.stdin:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    self.command(line)
                    print("done", flush=True)
                else:
                    self._take(self._files.index(file))
            self._deliver()

    def _take(self, sender: int) -> None:
        """Packets that a host has sent, a few at a time so that the others get their turn."""
        for _ in range(16):
            try:
                packet = os.read(self._files[sender], MTU)
            except BlockingIOError:
                return
            receiver = self._host_of.get(packet[16:20])  # the destination in an IPv4 header
            if receiver is None or packet[0] >> 4 != 4:
                continue
            now = time.monotonic()
            sent = max(now, self._free_at[sender]) + len(packet) * self._seconds_per_byte
            self._free_at[sender] = sent
            self._on_the_way[sender].append((sent + self._latency_s, receiver, packet))
            if sent > now + BACKLOG_S:
                return

    def _deliver(self) -> None:
        now = time.monotonic()
        for sender, queue in enumerate(self._on_the_way):
            while queue and queue[0][0] <= now:
                _, receiver, packet = queue.popleft()
                if frozenset((sender, receiver)) not in self._cut:
                    with contextlib.suppress(BlockingIOError):  # a full buffer drops it
                        os.write(self._files[receiver], packet)


def main() -> None:
    rate, latency_ms, *hosts = sys.argv[1:]
    pairs = [host.split("=") for host in hosts]
    files = [open_device(pid, address) for pid, address in pairs]
    set_namespace(os.getppid(), "net")  # back: this program belongs to no host
    addresses = [bytes(map(int, address.split("."))) for _, address in pairs]
    link = Link(files, addresses, None if rate == "none" else float(rate), float(latency_ms) / 1000)
    print("ready", flush=True)
    link.run()


if __name__ == "__main__":
    main()
