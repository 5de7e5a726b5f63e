"""What is wrong with the nodes is said before anything trains.

Invariant: a host that is not there or not like the others, or a port that is taken, ends the launcher within 30 s with exit code
2 and an error that names it, and nothing of the run stays alive on any host. A breach would show as a launcher that waits for
minutes, a traceback, or ranks that wait for peers which never come.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.host_runs import Commands, Ended, by_deepspeed, by_ssh, on_each, settings
from support.hosts import Host, Hosts, needs_sshd, unavailable

import dist_mtp

REASON = needs_sshd() or unavailable("pdsh")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

WITHIN_S = 30.0
BY_SSH = [by_ssh, by_deepspeed]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    with Hosts(2) as cluster:
        cluster.start_sshd()
        yield cluster


def refused(cluster: Hosts, commands: dict[Host, list[str]], folder: Path) -> dict[Host, Ended]:
    """How the commands ended; all must be refused in time and leave nothing."""
    with Commands(cluster, commands, folder, "refused") as running:
        ended = running.end(WITHIN_S)
        assert {end.code for end in ended.values()} == {2}, running.output
        assert running.left_behind(2) == {}
    assert "Traceback" not in running.output
    assert not list(folder.glob("run/checkpoints/*")), "it has trained"
    return ended


@contextlib.contextmanager
def on_host(host: Host, program: list[str]) -> Iterator[None]:
    """A program that says when it is ready and stays."""
    with subprocess.Popen(host.command(program), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def other_code(host: Host, folder: Path) -> Iterator[None]:
    """``host`` alone sees another version of one file of dist_mtp."""
    file = Path(dist_mtp.__file__).with_name("learning_rate.py")
    changed = folder / file.name
    changed.write_text(file.read_text() + "\n# a local change\n")
    subprocess.run(host.command(["mount", "--bind", str(changed), str(file)]), check=True)
    try:
        yield
    finally:
        subprocess.run(host.command(["umount", str(file)]), check=True)


@pytest.mark.parametrize("start", BY_SSH)
def test_an_unknown_host(start: Callable[..., dict[Host, list[str]]], cluster: Hosts, tmp_path: Path) -> None:
    commands = start(cluster, settings(tmp_path, "run"))
    ((host, command),) = commands.items()
    misspelt = [word.replace("node1]", "nod1]") for word in command]
    (ended,) = refused(cluster, {host: misspelt}, tmp_path).values()
    assert "error: nod1 cannot be reached by ssh" in ended.output
    assert "Could not resolve hostname nod1" in ended.output or "Temporary failure in name resolution" in ended.output


@pytest.mark.parametrize("start", BY_SSH)
def test_a_host_that_does_not_answer(
    start: Callable[..., dict[Host, list[str]]], cluster: Hosts, tmp_path: Path
) -> None:
    cluster.cut(cluster.hosts[1])
    try:
        (ended,) = refused(cluster, start(cluster, settings(tmp_path, "run")), tmp_path).values()
    finally:
        cluster.restore(cluster.hosts[1])
    assert "error: node1 cannot be reached by ssh" in ended.output


@pytest.mark.parametrize("start", BY_SSH)
def test_other_code_on_one_host(start: Callable[..., dict[Host, list[str]]], cluster: Hosts, tmp_path: Path) -> None:
    with other_code(cluster.hosts[1], tmp_path):
        (ended,) = refused(cluster, start(cluster, settings(tmp_path, "run")), tmp_path).values()
    assert "error: dist_mtp's own code (SHA-256) differs" in ended.output
    assert "node0" in ended.output
    assert "node1" in ended.output


@pytest.mark.parametrize("start", BY_SSH)
def test_a_port_that_is_taken(start: Callable[..., dict[Host, list[str]]], cluster: Hosts, tmp_path: Path) -> None:
    listener = (
        "import socket, time; taken = socket.create_server(('', 29500)); print('ready', flush=True); time.sleep(99)"
    )
    with on_host(cluster.hosts[0], [sys.executable, "-c", listener]):
        (ended,) = refused(cluster, start(cluster, settings(tmp_path, "run")), tmp_path).values()
    assert "port 29500" in ended.output
    assert "node0" in ended.output


def test_another_configuration_on_one_host(cluster: Hosts, tmp_path: Path) -> None:
    commands = on_each(cluster, settings(tmp_path, "run"))
    commands[cluster.hosts[1]].append("train.seed=2")
    ended = refused(cluster, commands, tmp_path)
    for end in ended.values():
        assert "composed another configuration than" in end.output


def test_a_node_that_is_not_started(cluster: Hosts, tmp_path: Path) -> None:
    commands = on_each(cluster, settings(tmp_path, "run", "launcher.join_timeout_s=3"))
    first = cluster.hosts[0]
    (ended,) = refused(cluster, {first: commands[first]}, tmp_path).values()
    assert "1 of 2 nodes came within launcher.join_timeout_s=3: node0" in ended.output
