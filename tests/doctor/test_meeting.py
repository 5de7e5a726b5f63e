"""The way between hosts, over loopback and between hosts in network namespaces: who cannot pass is named, nobody stays."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from support.hosts import Hosts, unavailable

from dist_mtp.doctor import meeting
from dist_mtp.doctor.meeting import check_way, exchange, way_findings
from dist_mtp.launch.facts import is_free

SOON_S = 30.0
"""Several starts of Python, on a busy machine."""


@pytest.fixture
def port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def here(host: str, argv: Sequence[str]) -> list[str]:
    """All hosts are this machine, but the way from ``blocked`` ends at a port where nobody listens."""
    return [*argv[:-1], "1"] if host == "blocked" else list(argv)


def test_open_way(port: int) -> None:
    (found,) = way_findings(["a", "b", "c"], ("127.0.0.1", port), here)
    assert (found.level, found.what[:21]) == ("ok", "2 of 2 other hosts re"), found
    assert is_free(port), "the listener is still there"


def test_only_who_cannot_pass_is_named(port: int) -> None:
    (found,) = way_findings(["a", "b", "blocked"], ("127.0.0.1", port), here)
    assert (found.name, found.level) == ("blocked: way", "error"), found
    assert found.what == f"127.0.0.1:{port} was not reached: Connection refused", found
    assert found.fix.startswith(f"open port {port} of a for it"), found
    assert is_free(port), "the listener is still there"


def test_name_that_is_not_known_has_its_own_fix() -> None:
    answer = {"problem": "Name or service not known", "name": True}
    found = check_way("b", "a", ("node-a", 1), answer)
    assert found is not None
    assert found.fix == "correct launcher.rendezvous, or add node-a to /etc/hosts there"


def test_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        (found,) = way_findings(["a", "b"], ("127.0.0.1", taken), here)
    assert (found.name, found.level) == (f"a: port {taken}", "error"), found
    assert found.what == "cannot be listened on: Address already in use", found


class TestBounds:
    """Nothing waits for a host that says nothing, and a listener without its doctor ends."""

    def test_host_that_never_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(meeting, "START_S", 0.3)
        began = time.monotonic()
        (found,) = way_findings(["a", "b"], ("127.0.0.1", 1), lambda host, argv: ["sleep", "60"])
        assert time.monotonic() - began < SOON_S
        assert found.what == "cannot be listened on: no listener within 0 s", found

    def test_host_that_never_connects(self, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(meeting, "CONNECT_S", 0.1)
        began = time.monotonic()

        def command(host: str, argv: Sequence[str]) -> list[str]:
            if host == "a":
                return list(argv)
            monkeypatch.setattr(meeting, "START_S", 0.3)
            return ["sleep", "60"]

        (found,) = way_findings(["a", "b"], ("127.0.0.1", port), command)
        assert time.monotonic() - began < SOON_S
        assert found.what.endswith("was not reached: no answer within 0 s"), found

    def test_way_that_swallows_what_is_sent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel connects, but nobody ever answers."""
        monkeypatch.setattr(meeting, "CONNECT_S", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(TimeoutError):
            exchange("127.0.0.1", server.getsockname()[1])

    def test_another_program_answers(self) -> None:
        def answer(server: socket.socket) -> None:
            connected, _ = server.accept()
            with connected:
                connected.recv(meeting._BYTES, socket.MSG_WAITALL)
                connected.sendall(b"HTTP/1.1 400 Bad Request")

        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(SOON_S)
            threading.Thread(target=answer, args=(server,), daemon=True).start()
            with pytest.raises(ConnectionError, match="another program answers there"):
                exchange("127.0.0.1", server.getsockname()[1])

    @pytest.mark.parametrize("ends", ["input", "time"])
    def test_listener_ends(self, ends: str, port: int) -> None:
        limit = 600.0 if ends == "input" else 0.5
        program = f"from dist_mtp.doctor import meeting; meeting.LISTEN_S = {limit}; meeting.main(['listen', '{port}'])"
        with subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == b"dist_mtp listens\n"
                if ends == "input":
                    process.stdin.close()
                assert process.wait(SOON_S) == 0
            finally:
                process.kill()
        assert is_free(port)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    with Hosts(3) as hosts:
        yield hosts


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_blocked_port_between_hosts(cluster: Hosts) -> None:
    """From node2 everything but the rendezvous port of node0 can be reached, so ssh would work; then nothing is blocked."""
    hosts = {host.name: host for host in cluster.hosts}
    rule = ["priority", "10", "ipproto", "tcp", "dport", "29500", "unreachable"]

    def found() -> list[tuple[str, str, str]]:
        findings = way_findings(list(hosts), ("node0", 29500), lambda host, argv: hosts[host].command(argv))
        return [(finding.name, finding.level, re.sub(r"\d+ ms", "N ms", finding.what)) for finding in findings]

    subprocess.run(hosts["node2"].command(["ip", "rule", "add", *rule]), check=True, timeout=SOON_S)
    try:
        blocked = found()
    finally:
        subprocess.run(hosts["node2"].command(["ip", "rule", "del", *rule]), check=True, timeout=SOON_S)
    assert blocked == [("node2: way", "error", "node0:29500 was not reached: Network is unreachable")]
    assert found() == [
        ("way between hosts", "ok", "2 of 2 other hosts reach node0:29500, 64 KiB there and back in N ms")
    ]
    left = {host.name: host.processes() for host in cluster.hosts if host.processes()}
    assert not left, f"processes are still there: {left}"
