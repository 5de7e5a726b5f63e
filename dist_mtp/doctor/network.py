"""Ports, the host's own name and its network interfaces."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

import psutil

from dist_mtp.config import LauncherConfig
from dist_mtp.doctor.finding import Finding
from dist_mtp.launch.facts import is_free
from dist_mtp.launcher_checks import DEFAULT_PORT, parse_endpoint

TENSORBOARD_PORT = 6006
_CONNECT_S = 5.0


def check_rendezvous_port(port: int, *, is_free: bool, nodes_meet_here: bool) -> Finding:
    """The port of the first node where the others announce themselves."""
    name = f"port {port}"
    if is_free:
        return Finding(name, "ok", "free, for nodes to meet")
    if nodes_meet_here:
        fix = "end its owner (ss -ltnp), or set launcher.rendezvous=HOST:PORT"
        return Finding(name, "error", "in use, but the nodes meet there", fix)
    return Finding(name, "note", "in use; this run does not need it on this machine")


def check_rendezvous_host(host: str, addresses: Sequence[str] | None) -> Finding:
    """Args: ``addresses`` that the first node's name resolves to; None if it does not."""
    if addresses is None:
        fix = "correct launcher.rendezvous, or add its address to /etc/hosts"
        return Finding("rendezvous", "error", f"{host} does not resolve: this node cannot find the others", fix)
    return Finding("rendezvous", "ok", f"{host} is {', '.join(addresses)}")


def check_rendezvous_answers(host: str, port: int, problem: OSError | None) -> Finding:
    """Args: ``problem`` that another node than the first met when it connected there."""
    name, where = "way", f"{host}:{port}"
    if problem is None:
        return Finding(name, "ok", f"{where} is reached: somebody listens already")
    if isinstance(problem, ConnectionRefusedError):
        return Finding(name, "note", f"{host} is reached; nobody listens on port {port} yet")
    fix = f"open port {port} of {host}, or set launcher.rendezvous to an address of it that this node reaches"
    return Finding(name, "error", f"{where} was not reached: {problem.strerror or problem}", fix)


def check_tensorboard_port(*, is_free: bool) -> Finding:
    name = f"port {TENSORBOARD_PORT}"
    if is_free:
        return Finding(name, "ok", "free, for TensorBoard")
    return Finding(name, "note", "in use: a TensorBoard may be running already; another one needs --port")


def check_host_name(name: str, addresses: Sequence[str] | None) -> Finding:
    """Ranks are told an interface instead, see :mod:`dist_mtp.parallel.environment`, but other programs look it up.

    Args:
        addresses: that the name resolves to; None if it does not.
    """
    if addresses is None:
        fix = f"add a line '127.0.1.1 {name}' to /etc/hosts"
        return Finding("host name", "warning", f"{name} does not resolve: mpirun and others look it up", fix)
    return Finding("host name", "ok", f"{name} is {', '.join(addresses)}")


def check_interfaces(addresses: Mapping[str, Sequence[str]], wanted: str | None, *, several_nodes: bool) -> Finding:
    """Interfaces that are up.

    Args:
        addresses: of each.
        wanted: ``launcher.interface``.
    """
    shown = ", ".join(f"{name} {' '.join(found)}" for name, found in addresses.items()) or "none"
    if wanted is not None and wanted not in addresses:
        what = f"launcher.interface={wanted} is not up here: {shown}"
        return Finding("interfaces", "error", what, "name one of these, or leave launcher.interface=null")
    if not any(address.startswith("127.") for found in addresses.values() for address in found):
        return Finding(
            "interfaces", "error", f"no loopback among {shown}: ranks of one node meet there", "ip link set lo up"
        )
    if several_nodes and not set(addresses) - {"lo"}:
        return Finding(
            "interfaces", "error", f"only {shown}: other nodes cannot be reached", "bring up a network interface"
        )
    return Finding("interfaces", "ok", shown)


def network_findings() -> list[Finding]:
    """What any machine has."""
    name = socket.gethostname()
    return [
        check_tensorboard_port(is_free=is_free(TENSORBOARD_PORT)),
        check_host_name(name, _addresses(name)),
    ]


def node_findings(
    launcher: LauncherConfig, *, several_nodes: bool, nodes_meet_here: bool, starts_alone: bool
) -> list[Finding]:
    """What a machine has that ranks train on.

    Args:
        starts_alone: the command is given on every node, so that nobody tries the way between them from outside.
    """
    host, port = parse_endpoint(launcher.rendezvous) if launcher.rendezvous is not None else (None, DEFAULT_PORT)
    found = [check_rendezvous_port(port, is_free=is_free(port), nodes_meet_here=nodes_meet_here)]
    if host is not None:
        addresses = _addresses(host)
        found.append(check_rendezvous_host(host, addresses))
        if addresses is not None and starts_alone and not nodes_meet_here:
            found.append(check_rendezvous_answers(host, port, _connection_problem(host, port)))
    return [*found, check_interfaces(_interfaces(), launcher.interface, several_nodes=several_nodes)]


def _connection_problem(host: str, port: int) -> OSError | None:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        return error
    return None


def _addresses(name: str) -> list[str] | None:
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None)})
    except OSError:
        return None


def _interfaces() -> dict[str, list[str]]:
    states = psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    found = {
        name: [address.address.partition("%")[0] for address in addresses if address.family in families]
        for name, addresses in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    }
    return {name: addresses for name, addresses in found.items() if addresses}
