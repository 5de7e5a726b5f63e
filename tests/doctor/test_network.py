"""Ports, names and interfaces."""

from __future__ import annotations

import socket

import pytest

from dist_mtp.config import LauncherConfig
from dist_mtp.doctor import network
from dist_mtp.doctor.finding import Finding, split_fix, table


@pytest.mark.parametrize(
    ("found", "level"),
    [
        (network.check_rendezvous_port(1, is_free=True, nodes_meet_here=True), "ok"),
        (network.check_rendezvous_port(1, is_free=False, nodes_meet_here=True), "error"),
        (network.check_rendezvous_port(1, is_free=False, nodes_meet_here=False), "note"),
        (network.check_rendezvous_answers("a", 1, None), "ok"),
        (network.check_rendezvous_answers("a", 1, ConnectionRefusedError()), "note"),
        (network.check_rendezvous_answers("a", 1, OSError(113, "No route to host")), "error"),
        (network.check_rendezvous_answers("a", 1, TimeoutError("timed out")), "error"),
        (network.check_tensorboard_port(is_free=False), "note"),
        (network.check_rendezvous_host("a", None), "error"),
        (network.check_rendezvous_host("a", ["10.0.0.1"]), "ok"),
        (network.check_host_name("a", None), "warning"),
        (network.check_host_name("a", ["127.0.1.1"]), "ok"),
        (network.check_interfaces({"lo": ["127.0.0.1"]}, None, several_nodes=False), "ok"),
        (network.check_interfaces({"eth0": ["10.0.0.1"]}, None, several_nodes=False), "error"),
        (network.check_interfaces({"lo": ["127.0.0.1"]}, None, several_nodes=True), "error"),
        (
            network.check_interfaces({"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.1"]}, "eth1", several_nodes=True),
            "error",
        ),
        (
            network.check_interfaces({"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.1"]}, "eth0", several_nodes=True),
            "ok",
        ),
    ],
)
def test_levels(found: Finding, level: str) -> None:
    assert found.level == level, found
    assert bool(found.fix) == (level in ("warning", "error")), found


@pytest.mark.parametrize(("starts_alone", "meet_here"), [(True, False), (True, True), (False, False)])
def test_first_node_is_tried_by_the_others(starts_alone: bool, meet_here: bool) -> None:
    """Where nobody does so from outside, and not by the first node itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        launcher = LauncherConfig(name="torchrun", nodes=2, rendezvous=f"127.0.0.1:{server.getsockname()[1]}")
        found = network.node_findings(
            launcher, several_nodes=True, nodes_meet_here=meet_here, starts_alone=starts_alone
        )
    ways = [finding.level for finding in found if finding.name == "way"]
    assert ways == (["ok"] if starts_alone and not meet_here else []), found


def test_table() -> None:
    """Columns, wrapped texts, fixes on lines of their own, and a count that knows the plural."""
    lines = table([Finding("a", "ok", "x"), Finding("name", "error", "word " * 40, "do it"), Finding("b", "note", "y")])
    assert lines[0] == "a     ok       x"
    assert lines[1].startswith("name  error    word word")
    assert lines[2].startswith(" " * 15 + "word"), lines[2]
    assert lines[3] == " " * 15 + "fix: do it"
    assert lines[-1] == "1 error, 0 warnings"
    assert max(map(len, lines)) <= 120


def test_fix_stands_after_the_last_colon() -> None:
    assert split_fix("a: b is c: do d") == ("a: b is c", "do d")
    assert split_fix("no fix") == ("no fix", "")
