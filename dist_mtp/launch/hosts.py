"""Which machines a run uses: names, hostfile and rendezvous, checked before any of them reaches a command line."""

from __future__ import annotations

import re
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from dist_mtp.errors import ConfigError
from dist_mtp.launcher_checks import check_host

_LINE = re.compile(r"(?P<host>\S+)(\s+slots=(?P<slots>\d+))?")


@dataclass(frozen=True)
class Node:
    """One machine."""

    host: str
    slots: int | None
    """Ranks that the hostfile gives it."""


def read_hostfile(path: str) -> tuple[Node, ...]:
    """Lines ``HOST slots=N``; empty ones and what follows ``#`` are skipped.

    Raises:
        ConfigError: it cannot be read, others may write to it, or a line is something else.
    """
    file = Path(path)
    try:
        if file.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(
                f"launcher.hostfile={path} can be written by others, who could so run commands as you: chmod go-w {path}"
            )
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"launcher.hostfile={path} cannot be read: {error}") from error
    nodes = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise ConfigError(f"{path}, line {number}: {line!r} is not 'HOST slots=N'")
        check_host(match["host"], f"{path}, line {number}")
        slots = None if match["slots"] is None else int(match["slots"])
        if slots == 0:
            raise ConfigError(
                f"{path}, line {number}: {match['host']} has slots=0: give it at least 1, or remove the line"
            )
        nodes.append(Node(match["host"], slots))
    if not nodes:
        raise ConfigError(f"launcher.hostfile={path} names no host: write one 'HOST slots=N' per line")
    _check_different([node.host for node in nodes], path)
    return tuple(nodes)


def named_nodes(hosts: Sequence[str], hostfile: str | None) -> tuple[Node, ...]:
    """The nodes of ``launcher.hosts`` or ``launcher.hostfile``; empty when neither is given."""
    if hostfile is not None:
        return read_hostfile(hostfile)
    _check_different(hosts, "launcher.hosts")
    return tuple(Node(host, None) for host in hosts)


def is_this_machine(host: str) -> bool:
    """Whether ``host`` is a name or an address of this machine."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError:
        return False
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return any(address in own or is_loopback(address) for address in found)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is another machine on every machine."""
    return host == "localhost" or host.startswith("127.")


def _check_different(hosts: Sequence[str], where: str) -> None:
    twice = sorted({host for host in hosts if hosts.count(host) > 1})
    if twice:
        raise ConfigError(f"{where} names {', '.join(twice)} twice: one line per machine, with all its slots")
