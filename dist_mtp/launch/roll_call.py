"""The first node's side of a run on several nodes: who takes part, is everybody the same, and has anybody gone.

Before the first rank is started, every node's launcher announces itself here with what must be equal on all of them. While
ranks train, launchers and roll call exchange a beat every second, so that a dead machine or a cut cable is noticed after
``launcher.node_timeout_s`` and not after the much longer time that a rank may wait for a slow peer. The first node to fail
ends all others, with one message that says what happened where.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dist_mtp.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_RANK_FAILURE, EXIT_TERMINATED, ConfigError
from dist_mtp.launch.facts import compare_facts
from dist_mtp.launch.messages import Connection, Message
from dist_mtp.same_run import changed_keys

BEAT_S = 1.0
"""Between two signs of life."""
_ORDERLY = (EXIT_DONE, EXIT_INTERRUPTED, EXIT_TERMINATED)
SETTLE_S = 3.0
"""When a rank dies its peers fail as well. This long reports are collected before one is taken for the cause."""


@dataclass
class Member:
    """One node, as the roll call knows it."""

    connection: Connection
    host: str
    address: str
    """Where other nodes reach it."""
    ranks: int
    """It wants to start this many."""
    wanted_rank: int | None
    probe_port: int
    """Other launchers may connect here to see whether the way is open."""
    facts: dict[str, Any]
    config: dict[str, Any]
    """As composed there."""
    node_rank: int = -1
    heard: float = field(default_factory=time.monotonic)
    report: Message | None = None
    """How its ranks ended."""

    @property
    def name(self) -> str:
        return f"node {self.node_rank} ({self.host}, {self.address})"


class RollCall:
    """Listens on ``port`` of the first node.

    Args:
        run: what this run is called; launchers of other runs are turned away.
        nodes: that take part.
        min_nodes: that suffice when ``join_timeout_s`` has passed.
        token: secret that all launchers of the run know, or empty.
        expected: hosts that shall come, for messages; empty when unknown.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self,
        port: int,
        *,
        run: str,
        nodes: int,
        min_nodes: int,
        token: str,
        join_timeout_s: float,
        node_timeout_s: float,
        expected: Sequence[str] = (),
    ) -> None:
        self._run, self._nodes, self._min_nodes, self._token = run, nodes, min_nodes, token
        self._join_timeout_s, self._node_timeout_s, self._expected = join_timeout_s, node_timeout_s, expected
        self.port = port
        self.members: list[Member] = []
        self.verdict: Message | None = None
        """How the run ended on all nodes: ``code`` and ``message``."""
        self._changed = threading.Condition()
        self._open = True
        self._first_failure: float | None = None
        self._listener = socket.create_server(("", port), backlog=256)
        threading.Thread(target=self._accept, name="roll call", daemon=True).start()

    def gather(self) -> list[Member]:
        """Wait until all nodes, or enough, have come; returns them in the order of their ranks.

        Raises:
            ConfigError: too few came, two want the same rank, or they are not alike. All that came are told.
        """
        deadline = time.monotonic() + self._join_timeout_s
        with self._changed:
            while len(self.members) < self._nodes and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            self._open = False
            members = list(self.members)
        try:
            if len(members) < self._min_nodes:
                raise ConfigError(self._too_few(members))
            ordered = _in_order(members)
            _check_alike(ordered)
        except ConfigError as error:
            self.refuse(str(error), error.exit_code)
            raise
        if len(ordered) > 1:
            # Its own connection does not leave the machine; what counts is the address at which the others see it.
            ordered[0].address = ordered[1].connection.own_address
        self.members = ordered
        return ordered

    def start(self, **assignment: Any) -> None:
        """Tell every node to start its ranks, and watch over all of them from now on."""
        nodes = [{"host": m.host, "address": m.address, "ranks": m.ranks, "port": m.probe_port} for m in self.members]
        nodes[0]["port"] = self.port
        for member in self.members:
            member.heard = time.monotonic()
            member.connection.send("start", node_rank=member.node_rank, nodes=nodes, **assignment)
        threading.Thread(target=self._watch, name="roll call watch", daemon=True).start()

    def refuse(self, message: str, code: int) -> None:
        """Turn everybody away before anything was started."""
        with self._changed:
            self._open = False
            members = list(self.members)
        for member in members:
            member.connection.send("refuse", message=message, code=code)

    def close(self) -> None:
        with self._changed:
            self._open = False
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # a blocked accept() would keep the port
        self._listener.close()
        for member in self.members:
            member.connection.close()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(Connection(accepted),), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        """One node's connection, from its announcement to its end."""
        message = connection.receive()
        if message is None or message["kind"] != "join":
            connection.close()  # a probe, or a stranger
            return
        if (problem := self._unwelcome(message)) is not None:
            connection.send("refuse", message=problem, code=ConfigError.exit_code)
            connection.close()
            return
        try:
            member = Member(
                connection=connection,
                host=str(message["host"]),
                address=connection.peer_address,
                ranks=int(message["ranks"]),
                wanted_rank=message["node_rank"],
                probe_port=int(message["probe_port"]),
                facts=dict(message["facts"]),
                config=dict(message["config"]),
            )
        except (KeyError, TypeError, ValueError):
            connection.close()  # not an announcement of ours
            return
        with self._changed:
            late = not self._open or len(self.members) >= self._nodes
            if not late:
                connection.send("welcome", beat_s=BEAT_S)  # with the last member everybody is told to start
                self.members.append(member)
                self._changed.notify_all()
        if late:
            text = f"{self._run} has its {len(self.members)} nodes already: it began without {member.host}, or a node was started twice"
            connection.send("refuse", message=text, code=ConfigError.exit_code)
            connection.close()
            return
        while (message := connection.receive()) is not None:
            member.heard = time.monotonic()
            if message["kind"] == "ended":
                with self._changed:
                    member.report = message
                    self._changed.notify_all()
        if self._open:
            with self._changed:  # it left while others are still awaited
                if self._open and member in self.members:
                    self.members.remove(member)
            return
        with self._changed:
            if member.report is None:
                text = f"the launcher on {member.name} ended without a word: it was killed, or the machine is down"
                member.report = {"code": EXIT_RANK_FAILURE, "message": text, "blame": 1}
            self._changed.notify_all()

    def _unwelcome(self, message: Message) -> str | None:
        if not secrets.compare_digest(str(message.get("token", "")).encode(), self._token.encode()):
            return "another launch of this run uses the same rendezvous: end it, or choose another port in launcher.rendezvous"
        if message.get("run") != self._run:
            return (
                f"the rendezvous gathers the nodes of {self._run!r}, not of {message.get('run')!r}: choose another port in "
                "launcher.rendezvous"
            )
        return None

    def _too_few(self, members: Sequence[Member]) -> str:
        came = ", ".join(f"{m.host} ({m.address})" for m in members) or "none"
        ranks = {member.wanted_rank for member in members}
        missing = [host for rank, host in enumerate(self._expected) if rank not in ranks]
        who = f"missing: {', '.join(missing)}" if missing else ""
        return (
            f"{len(members)} of {self._nodes} nodes came within launcher.join_timeout_s={self._join_timeout_s:g}: {came}"
            f"{'; ' if who else ''}{who}. Start the same command on the others, see that they reach port {self.port} of this "
            "node, or raise launcher.join_timeout_s"
        )

    def _watch(self) -> None:
        """Beats, silence and reports until every node has ended; then says so to all."""
        while self.verdict is None:
            for member in self.members:
                # Also to those that have ended: they wait for the verdict, and the others may be saving for long.
                member.connection.send("beat")
            with self._changed:
                self._changed.wait(BEAT_S if self._first_failure is None else 0.2)
                self._note_silence()
                self.verdict = self._judge()
        kind = "done" if all(_ends_alone(member.report) for member in self.members) else "stop"
        for member in self.members:
            member.connection.send(kind, **self.verdict)

    def _note_silence(self) -> None:
        now = time.monotonic()
        waiting = [member for member in self.members if member.report is None]
        if all(now - member.heard <= self._node_timeout_s for member in waiting):
            return
        # What broke for all of them at once is noticed in the rhythm of each one's beats.
        silent = [member for member in waiting if now - member.heard > self._node_timeout_s - 1.5 * BEAT_S]
        text = _explain_silence(silent, self.members, now - min(member.heard for member in silent))
        for member in silent:
            member.report = {"code": EXIT_RANK_FAILURE, "message": text, "blame": 0}

    def _judge(self) -> Message | None:
        """The run's end, once it is clear."""
        reports = [m.report for m in self.members if m.report is not None]
        failures = [report for report in reports if not _ends_alone(report)]
        if failures:
            if self._first_failure is None:
                self._first_failure = time.monotonic()
            cause = min(failures, key=lambda report: report["blame"])
            everybody = len(reports) == len(self.members)
            settled = cause["blame"] == 0 or everybody or time.monotonic() - self._first_failure > SETTLE_S
            return {"code": cause["code"], "message": cause["message"]} if settled else None
        if len(reports) < len(self.members):
            return None
        code = min((report["code"] for report in reports if report["code"]), default=EXIT_DONE)
        return {"code": code, "message": next((r["message"] for r in reports if r["code"] == code), "")}


def _ends_alone(report: Message | None) -> bool:
    """Whether the node's end leaves the others to end by themselves, because all ranks were done or agreed to stop."""
    return report is not None and report["code"] in _ORDERLY and report.get("agreed", True)


def _explain_silence(silent: Sequence[Member], members: Sequence[Member], silent_s: float) -> str:
    first, others = members[0], members[1:]
    if len(silent) == len(others) > 1:
        return f"no sign of life from any of the {len(others)} other nodes for {silent_s:.0f} s: the link of {first.host} is broken"
    names = ", ".join(member.name for member in silent)
    hosts = ", ".join(member.host for member in silent)
    are = "is" if len(silent) == 1 else "are"
    return f"no sign of life from {names} for {silent_s:.0f} s: the link between {first.host} and {hosts} is broken, or {hosts} {are} down"


def _in_order(members: Sequence[Member]) -> list[Member]:
    """By the rank that they ask for; the others fill the places that are left in the order in which they came."""
    chosen: dict[int, Member] = {}
    for member in members:
        rank = member.wanted_rank
        if rank is None:
            continue
        if rank in chosen:
            raise ConfigError(
                f"{chosen[rank].host} and {member.host} were both started with launcher.node_rank={rank}: give each its own, "
                "or leave it null"
            )
        chosen[rank] = member
    for member in members:
        if member.wanted_rank is None:
            chosen[next(rank for rank in range(len(members)) if rank not in chosen)] = member
    ordered = [chosen[rank] for rank in sorted(chosen)]  # with fewer nodes than planned, the rest move up
    for rank, member in enumerate(ordered):
        member.node_rank = rank
    return ordered


def _check_alike(members: Sequence[Member]) -> None:
    first = members[0]
    if problems := compare_facts({f"{m.host} (node {m.node_rank})": m.facts for m in members}):
        raise ConfigError("; ".join(problems))
    for member in members:
        if changed := changed_keys(first.config, member.config):
            keys = ", ".join(f"{key} {theirs} instead of {ours}" for key, (ours, theirs) in changed.items())
            raise ConfigError(
                f"{member.host} composed another configuration than {first.host} ({keys}): give the same command on every node"
            )
    unequal = {m.host: m.ranks for m in members if m.ranks != first.ranks}
    if unequal:
        text = ", ".join(f"{host} {ranks}" for host, ranks in unequal.items())
        raise ConfigError(
            f"nodes want to start different numbers of ranks: {first.host} {first.ranks}, {text}: set launcher.ranks_per_node"
        )
