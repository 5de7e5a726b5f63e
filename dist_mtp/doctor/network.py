"""Ports, the host's own name and its network interfaces."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence

import psutil

from dist_mtp.config import LauncherConfig
from dist_mtp.doctor.finding import Finding
from dist_mtp.launcher_checks import DEFAULT_PORT, parse_endpoint

TENSORBOARD_PORT = 6006


def check_rendezvous_port(port: int, *, is_free: bool, several_nodes: bool) -> Finding:
    """The port of the first node where the others announce themselves."""
    name = f"port {port}"
    if is_free:
        return Finding(name, "ok", "free, for nodes to meet")
    if several_nodes:
        return Finding(
            name,
            "error",
            "in use, but the nodes meet there",
            "end its owner (ss -ltnp), or set launcher.rendezvous=HOST:PORT",
        )
    return Finding(name, "note", "in use; ranks of one node choose a free one")


def check_tensorboard_port(*, is_free: bool) -> Finding:
    name = f"port {TENSORBOARD_PORT}"
    if is_free:
        return Finding(name, "ok", "free, for TensorBoard")
    return Finding(name, "note", "in use: a TensorBoard may be running already; another one needs --port")


def check_host_name(name: str, addresses: Sequence[str] | None, *, several_nodes: bool) -> Finding:
    """What other nodes would connect to if they took this machine's name for its address.

    Args:
        addresses: that the name resolves to; None if it does not.
    """
    if addresses is None:
        fix = f"add a line 'ADDRESS {name}' to /etc/hosts"
        return Finding("host name", "warning", f"{name} does not resolve: gloo looks it up", fix)
    shown = f"{name} is {', '.join(addresses)}"
    if several_nodes and all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        what = f"{shown}, which other nodes cannot reach"
        return Finding(
            "host name", "warning", what, f"give {name} its network address in /etc/hosts, or set launcher.interface"
        )
    return Finding("host name", "ok", shown)


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
    if several_nodes and not set(addresses) - {"lo"}:
        return Finding(
            "interfaces", "error", f"only {shown}: other nodes cannot be reached", "bring up a network interface"
        )
    return Finding("interfaces", "ok", shown)


def network_findings(launcher: LauncherConfig, *, several_nodes: bool) -> list[Finding]:
    """What this machine has."""
    port = DEFAULT_PORT if launcher.rendezvous is None else parse_endpoint(launcher.rendezvous)[1]
    name = socket.gethostname()
    return [
        check_rendezvous_port(port, is_free=port_is_free(port), several_nodes=several_nodes),
        check_tensorboard_port(is_free=port_is_free(TENSORBOARD_PORT)),
        check_host_name(name, _addresses(name), several_nodes=several_nodes),
        check_interfaces(_interfaces(), launcher.interface, several_nodes=several_nodes),
    ]


def port_is_free(port: int) -> bool:
    """Whether a server could listen on all interfaces; one that has just ended does not count."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError:
            return False
    return True


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
