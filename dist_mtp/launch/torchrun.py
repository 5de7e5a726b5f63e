"""Ranks on several nodes: all started from here by ssh, or by the same command on each."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from dist_mtp.config import Config, to_dict
from dist_mtp.errors import (
    EXIT_CONFIG,
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_RANK_FAILURE,
    ConfigError,
)
from dist_mtp.launch.agent import BEGAN, Node, run_node
from dist_mtp.launch.cluster import Cluster
from dist_mtp.launch.hosts import is_this_machine
from dist_mtp.launch.outcome import SAID
from dist_mtp.launch.remote import CONNECT_S, explain_ssh, ssh_command
from dist_mtp.launcher_checks import parse_endpoint
from dist_mtp.signals import handled

END_S = 5.0
"""After one node's launcher has ended the others follow; those that have not by then are told to."""
_RAN = (EXIT_DONE, EXIT_DIVERGED, EXIT_RANK_FAILURE)
"""Exit codes of the first node's launcher that only a run with all nodes has."""
_DOCUMENTED = (*_RAN, *SAID)


def run(config: Config, cluster: Cluster) -> int:
    """Start this node's ranks, or every node's; returns the run's exit code.

    Raises:
        DistMtpError: the nodes did not come together, or the run could not be prepared.
    """
    if cluster.hosts:
        return _run_all(config, cluster)
    node = Node(
        config,
        nodes=cluster.nodes,
        ranks=cluster.ranks_per_node,
        endpoint=endpoint(config, cluster),
        node_rank=config.launcher.node_rank,
    )
    return run_node(node)


def endpoint(config: Config, cluster: Cluster) -> tuple[str, int]:
    """Where the nodes meet."""
    first = cluster.hosts[0] if cluster.hosts else "127.0.0.1"
    return parse_endpoint(config.launcher.rendezvous or first)


def node_commands(config: Config, cluster: Cluster) -> list[list[str]]:
    """What starts each host's launcher, in the order of ranks."""
    host, port = endpoint(config, cluster)
    commands = []
    for rank, name in enumerate(cluster.hosts):
        argv = [sys.executable, "-u", "-m", "dist_mtp.launch.agent", "--stdin", "--nodes", str(cluster.nodes)]
        argv += ["--node-rank", str(rank), "--ranks", str(cluster.ranks_per_node), "--rendezvous", f"{host}:{port}"]
        argv += ["--quiet"] if rank else []
        is_here = is_this_machine(name)
        commands.append(argv if is_here else ssh_command(name, config.launcher.ssh_config, argv))
    return commands


@dataclass
class _Started:
    """One node's launcher, run here or by ssh."""

    host: str
    process: subprocess.Popen[str]
    is_first: bool
    """Its standard error is shown as it comes; the others have little to say that the first node does not."""
    has_begun: bool = False
    """It has met the others: the host was reached, and the run has begun."""
    said: list[str] = field(default_factory=list)
    """Lines on standard error that were not shown."""

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, name=f"stderr of {self.host}", daemon=True)
        self._reader.start()

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.rstrip("\n") == BEGAN:
                self.has_begun = True
            elif self.is_first:
                with contextlib.suppress(OSError, ValueError):  # the terminal is gone
                    print(line, end="", file=sys.stderr, flush=True)
            else:
                self.said.append(line)

    def read_all(self) -> None:
        """Once it has ended: wait for its last words, but not for a process of ssh's that keeps the pipe open."""
        self._reader.join(END_S)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def hang_up(self) -> None:
        """It takes the end of its standard input for the end of this process, and stops."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.close()


def _run_all(config: Config, cluster: Cluster) -> int:
    """Start a launcher on every host and stay until the last of them has ended."""
    introduction = json.dumps({"token": secrets.token_hex(16), "config": to_dict(config)})
    started: list[_Started] = []
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        for node in started:
            node.tell(f"signal {number}")

    for rank, (host, command) in enumerate(zip(cluster.hosts, node_commands(config, cluster), strict=True)):
        try:
            # In a session of its own: an interrupt at the terminal is for this process, which passes it on.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except FileNotFoundError as error:
            for node in started:
                node.hang_up()
            raise ConfigError(f"{command[0]} is not installed on this machine: install OpenSSH's client") from error
        started.append(_Started(host, process, is_first=rank == 0))
        started[-1].tell(introduction)
    with handled(pass_on):
        _wait(started)
    return _code(started, received)


def _wait(started: Sequence[_Started]) -> None:
    """Until no launcher is left."""
    began = time.monotonic()
    patience: float | None = None
    while any(node.code is None for node in started):
        time.sleep(0.05)
        now = time.monotonic()
        if patience is None and any(node.code for node in started):
            # A host that cannot be reached will not come, and the others need not wait for it. Of all later ends the
            # launchers tell each other.
            patience = now if _unreached(started) and now - began < 2 * CONNECT_S else now + END_S
        if patience is not None and now > patience:
            for node in started:
                node.hang_up()
            if now > patience + END_S:
                for node in started:
                    node.process.kill()
    for node in started:
        node.read_all()


def _unreached(started: Sequence[_Started]) -> list[_Started]:
    """Nodes on which our launcher never ran, or was lost sight of."""
    return [node for node in started if node.code is not None and node.code not in _DOCUMENTED]


def _code(started: Sequence[_Started], received: Sequence[int]) -> int:
    """The run's exit code.

    Args:
        received: signals that were passed on.
    """
    codes = [node.code for node in started]
    for node in started:
        for line in node.said:
            if line.startswith("error: "):
                print(f"{node.host}: {line}", end="", file=sys.stderr)
    first, began = codes[0], any(node.has_begun for node in started)
    if first in _RAN:
        return int(first)
    if received and not began:
        return 128 + received[0]  # launchers may have been too young to say so themselves
    if gone := [node for node in _unreached(started) if (node.code or 0) > 0]:
        if began:
            lost = ", ".join(node.host for node in gone)
            print(f"error: the connection to {lost} was lost after the run had begun: see its logs", file=sys.stderr)
            return EXIT_RANK_FAILURE
        for node in gone:
            print(f"error: {explain_ssh(node.host, node.code or 0, ''.join(node.said))}", file=sys.stderr)
        return EXIT_CONFIG
    if first in _DOCUMENTED:
        return int(first or 0)
    return next((code for code in codes if code in _DOCUMENTED and code), EXIT_RANK_FAILURE)
