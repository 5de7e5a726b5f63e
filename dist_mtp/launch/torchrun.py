"""Ranks on several nodes: all started from here by ssh, or by the same command on each."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from dist_mtp.config import Config, to_dict
from dist_mtp.errors import (
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_RANK_FAILURE,
    EXIT_TERMINATED,
    ConfigError,
)
from dist_mtp.launch.agent import BEGAN, Node, run_node
from dist_mtp.launch.cluster import Cluster
from dist_mtp.launch.hosts import is_this_machine
from dist_mtp.launch.remote import CONNECT_S, explain_ssh, ssh_command
from dist_mtp.launcher_checks import parse_endpoint
from dist_mtp.signals import handled

END_S = 5.0
"""After one node's launcher has ended the others follow; those that have not by then are told to."""
_RAN = (EXIT_DONE, EXIT_DIVERGED, EXIT_RANK_FAILURE)
"""Exit codes of the first node's launcher that only a run with all nodes has."""
_DOCUMENTED = (*_RAN, EXIT_CONFIG, EXIT_DATA, EXIT_INTERRUPTED, EXIT_TERMINATED)


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
    said: IO[str] | None
    """Its standard error; None for the first node, whose is shown as it comes."""

    @property
    def code(self) -> int | None:
        return self.process.poll()

    @property
    def errors(self) -> str:
        """What it had to say, as far as that was not for the run's log."""
        if self.said is None:
            return ""
        self.said.seek(0)
        return self.said.read()

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
    with contextlib.ExitStack() as stack:
        for rank, (host, command) in enumerate(zip(cluster.hosts, node_commands(config, cluster), strict=True)):
            said = stack.enter_context(tempfile.TemporaryFile("w+")) if rank else None
            try:
                # In a session of its own: an interrupt at the terminal is for this process, which passes it on.
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stderr=said, text=True, start_new_session=True
                )
            except FileNotFoundError as error:
                for node in started:
                    node.hang_up()
                raise ConfigError(f"{command[0]} is not installed on this machine: install OpenSSH's client") from error
            started.append(_Started(host, process, said))
            started[-1].tell(introduction)

        def pass_on(number: int, frame: object) -> None:
            for node in started:
                node.tell(f"signal {number}")

        with handled(pass_on):
            return _wait(started)


def _wait(started: Sequence[_Started]) -> int:
    """The run's exit code, once no launcher is left."""
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
    return _code(started)


def _unreached(started: Sequence[_Started]) -> list[_Started]:
    """Nodes on which our launcher never ran, or was lost sight of."""
    return [node for node in started if node.code is not None and node.code not in _DOCUMENTED]


def _code(started: Sequence[_Started]) -> int:
    codes = [node.code for node in started]
    for node in started[1:]:
        for line in node.errors.splitlines():
            if line.startswith("error: "):
                print(f"{node.host}: {line}", file=sys.stderr)
    first = codes[0]
    if first in _RAN:
        return int(first)
    if gone := [node for node in _unreached(started) if (node.code or 0) > 0]:
        if any(BEGAN in node.errors.splitlines() for node in started):
            lost = ", ".join(node.host for node in gone)
            print(f"error: the connection to {lost} was lost after the run had begun: see its logs", file=sys.stderr)
            return EXIT_RANK_FAILURE
        for node in gone:
            print(f"error: {explain_ssh(node.host, node.code or 0, node.errors)}", file=sys.stderr)
        return EXIT_CONFIG
    if first in _DOCUMENTED:
        return int(first or 0)
    return next((code for code in codes if code in _DOCUMENTED and code), EXIT_RANK_FAILURE)
