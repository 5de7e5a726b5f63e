"""Lines of JSON over a TCP connection: how the launchers of a run's nodes talk to each other."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

Message = dict[str, Any]

MAX_LINE = 1 << 20
"""Bytes of the longest message that is read; a peer that sends more is no launcher of ours."""


class Connection:
    """One peer. :meth:`send` may be called from any thread, :meth:`receive` from one."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _notice_a_dead_peer(connected)
        self._socket = connected
        self._lines = connected.makefile("rb")
        self._sending = threading.Lock()

    @property
    def peer_address(self) -> str:
        return str(self._socket.getpeername()[0])

    @property
    def own_address(self) -> str:
        """This machine's address as the peer sees it."""
        return str(self._socket.getsockname()[0])

    def send(self, kind: str, **content: Any) -> bool:
        """Whether the message could be handed to the network; a peer that is gone is noticed by whoever receives."""
        line = json.dumps({"kind": kind, **content}).encode() + b"\n"
        try:
            with self._sending:
                self._socket.sendall(line)
        except OSError:
            return False
        return True

    def receive(self) -> Message | None:
        """The next message, or None when the peer has closed the connection or does not speak this language."""
        try:
            line = self._lines.readline(MAX_LINE)
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) and "kind" in message else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _notice_a_dead_peer(connected: socket.socket) -> None:
    """Let the kernel ask after a peer that says nothing, as while the first node prepares a corpus."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}.items():
        if hasattr(socket, option):  # Linux
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def connect(host: str, port: int, timeout_s: float) -> Connection:
    """Raises OSError when nobody listens there or the way is blocked."""
    connected = socket.create_connection((host, port), timeout=timeout_s)
    connected.settimeout(None)
    return Connection(connected)
