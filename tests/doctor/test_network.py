"""Ports, names and interfaces."""

from __future__ import annotations

import pytest

from dist_mtp.doctor import network
from dist_mtp.doctor.finding import Finding, split_fix, table


@pytest.mark.parametrize(
    ("found", "level"),
    [
        (network.check_rendezvous_port(1, is_free=True, nodes_meet_here=True), "ok"),
        (network.check_rendezvous_port(1, is_free=False, nodes_meet_here=True), "error"),
        (network.check_rendezvous_port(1, is_free=False, nodes_meet_here=False), "note"),
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
