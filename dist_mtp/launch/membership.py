"""One node's side of the roll call: join, learn the others, show signs of life, and learn when the run is over."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dist_mtp.errors import EXIT_RANK_FAILURE, ConfigError, DistMtpError
from dist_mtp.launch.messages import Connection, Message, connect
from dist_mtp.launch.roll_call import BEAT_S, SETTLE_S

NAME_SHARE = 1 / 3
"""Of the time to join in which an unknown name is asked for again: machines that are just starting, as under Kubernetes, have
none yet."""
WELCOME_S = 5.0
"""A roll call answers an announcement at once; what does not is another program."""
PROBE_TIMEOUT_S = 3.0
MAX_PROBES = 64
"""Nodes that are tried when something broke; more would say the same."""


class RefusedError(DistMtpError):
    """The roll call turned this node away, or is gone; the first node says why."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Membership:
    """This node's connection to the roll call.

    Args:
        endpoint: where the first node listens.
        node_timeout_s: silence after which another node counts as lost.
    """

    def __init__(self, endpoint: tuple[str, int], *, node_timeout_s: float) -> None:
        self._endpoint, self._node_timeout_s = endpoint, node_timeout_s
        self.on_stop: Callable[[Message], object] = lambda verdict: None
        """Called once, from another thread, when this node's ranks must end although they did not by themselves."""
        self._connection: Connection | None = None
        self._verdict: Message | None = None
        self._decided = threading.Event()
        self._heard = time.monotonic()
        self.node_rank = -1
        self.nodes: Sequence[Mapping[str, Any]] = ()
        """``host``, ``address``, ``ranks`` and probe ``port`` of each node, in the order of their ranks."""
        self._prober = socket.create_server(("", 0), backlog=64)
        threading.Thread(target=self._answer_probes, name="probes", daemon=True).start()

    def join(self, announcement: Mapping[str, Any], timeout_s: float) -> None:
        """Announce this node; retries until somebody listens.

        Raises:
            ConfigError: nobody was there within ``timeout_s``, or the roll call does not want this node.
        """
        host, port = self._endpoint
        began = time.monotonic()
        deadline = began + timeout_s
        while True:
            try:
                self._connection = connect(host, port, timeout_s=min(5.0, max(0.1, deadline - time.monotonic())))
                break
            except socket.gaierror as error:
                if time.monotonic() < began + NAME_SHARE * timeout_s:
                    time.sleep(0.25)
                    continue
                raise ConfigError(
                    f"launcher.rendezvous={host}:{port}: the name {host} is not known on {socket.gethostname()} "
                    f"({error.strerror}): correct it, or give an address"
                ) from error
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"launcher.rendezvous={host}:{port} was not reached from {socket.gethostname()} within "
                        f"launcher.join_timeout_s={timeout_s:g}: {error}. Start the run on {host} too, and see that no "
                        "firewall is between"
                    ) from error
                time.sleep(0.25)
        self._connection.send("join", probe_port=self._prober.getsockname()[1], **announcement)
        message = self._receive_within(WELCOME_S)
        if message is None or message["kind"] != "welcome":
            text = (
                f"{host}:{port} is in use by a program that is no launcher of dist_mtp: end it, or choose another port with "
                f"launcher.rendezvous={host}:PORT"
            )
            raise _refusal(message, text)

    def wait_for_start(self) -> Message:
        """The first node's word that ranks shall start, with what it assigned.

        Raises:
            DistMtpError: it has refused, or is gone.
        """
        assert self._connection is not None, "join() comes first"
        message = self._connection.receive()
        if message is None or message["kind"] != "start":
            raise _refusal(message, f"the launcher on {self._endpoint[0]} ended before the run began: see its output")
        self.node_rank, self.nodes = message["node_rank"], message["nodes"]
        self._heard = time.monotonic()
        for target in (self._listen, self._beat, self._probe_neighbour):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()
        return message

    def leave(self, code: int, message: str) -> None:
        """Say why this node has no ranks, although it joined."""
        if self._connection is not None:
            self._connection.send("ended", code=code, message=message, blame=0, agreed=False)

    def finish(self, code: int, message: str, blame: int, *, agreed: bool = True) -> Message:
        """Report how this node's ranks ended and wait for the run's verdict: ``code`` and ``message``.

        Args:
            code, message, blame, agreed: see :class:`dist_mtp.launch.outcome.Outcome`.
        """
        assert self._connection is not None, "join() comes first"
        if blame > 0 and not self._decided.is_set() and (unreachable := self.unreachable()):
            message, blame = f"{message}; {', '.join(unreachable)}", min(blame, 2)
        self._connection.send("ended", code=code, message=message, blame=blame, agreed=agreed)
        # The others may be at work for as long as they like: their launchers show signs of life until they have ended.
        self._decided.wait()
        assert self._verdict is not None
        return self._verdict

    def unreachable(self) -> list[str]:
        """Other nodes whose launcher cannot be reached from here, in words."""
        others = [rank for rank in range(len(self.nodes)) if rank != self.node_rank][:MAX_PROBES]
        with ThreadPoolExecutor(max_workers=16) as pool:
            answers = list(pool.map(self._reaches, others))
        own = self._name(self.node_rank)
        return [
            f"{own} cannot reach {self._name(rank)}"
            for rank, is_open in zip(others, answers, strict=True)
            if not is_open
        ]

    def close(self) -> None:
        self._decided.set()
        self._prober.close()
        if self._connection is not None:
            self._connection.close()

    def _name(self, node_rank: int) -> str:
        node = self.nodes[node_rank]
        return f"node {node_rank} ({node['host']}, {node['address']})"

    def _receive_within(self, timeout_s: float) -> Message | None:
        """The next message of a peer that may be no launcher and never say anything."""
        assert self._connection is not None
        timer = threading.Timer(timeout_s, self._connection.close)
        timer.start()
        try:
            return self._connection.receive()
        finally:
            timer.cancel()

    def _listen(self) -> None:
        assert self._connection is not None
        while (message := self._connection.receive()) is not None:
            self._heard = time.monotonic()
            if message["kind"] in ("stop", "done"):
                self._decide(message, stop=message["kind"] == "stop")
                return
        if not self._decided.is_set():
            text = f"the launcher on {self._name(0)} ended without a word: it was killed, or the machine is down"
            self._decide({"code": EXIT_RANK_FAILURE, "message": text}, stop=True)

    def _beat(self) -> None:
        """Signs of life; also notices the silence of the first node."""
        assert self._connection is not None
        while not self._decided.wait(BEAT_S):
            self._connection.send("beat")
            silent_s = time.monotonic() - self._heard
            if silent_s > self._node_timeout_s:
                own, first = self.nodes[self.node_rank]["host"], self.nodes[0]["host"]
                text = (
                    f"no sign of life from {self._name(0)} for {silent_s:.0f} s: the link between {own} and {first} is "
                    f"broken, or {first} is down"
                )
                self._decide({"code": EXIT_RANK_FAILURE, "message": text}, stop=True)

    def _probe_neighbour(self) -> None:
        """Try the way to the next node of the ring: all nodes may reach the first one while two others lost each other."""
        neighbour = (self.node_rank + 1) % len(self.nodes)
        if 0 in (self.node_rank, neighbour):
            return  # their beats go the same way
        opened = time.monotonic()
        while not self._decided.wait(self._node_timeout_s / 4):
            if self._reaches(neighbour):
                opened = time.monotonic()
            elif time.monotonic() - opened > self._node_timeout_s:
                own, other = self._name(self.node_rank), self._name(neighbour)
                text = f"{own} has not reached {other} for {time.monotonic() - opened:.0f} s: the link between them is broken"
                message = {"code": EXIT_RANK_FAILURE, "message": text, "blame": 0}
                assert self._connection is not None
                self._connection.send("ended", **message)
                # The roll call hears of it and ends everybody; if it does not, this node ends by itself.
                if not self._decided.wait(2 * SETTLE_S):
                    self._decide(message, stop=True)

    def _reaches(self, node_rank: int) -> bool:
        node = self.nodes[node_rank]
        try:
            connect(node["address"], node["port"], PROBE_TIMEOUT_S).close()
        except OSError:
            return False
        return True

    def _answer_probes(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                self._prober.accept()[0].close()

    def _decide(self, verdict: Message, *, stop: bool) -> None:
        if self._decided.is_set():
            return
        self._verdict = {"code": verdict["code"], "message": verdict["message"]}
        if stop:
            self.on_stop(self._verdict)
        self._decided.set()


def _refusal(message: Message | None, otherwise: str) -> DistMtpError:
    if message is None or message["kind"] != "refuse":
        return ConfigError(otherwise)
    return RefusedError(str(message["message"]), int(message["code"]))
