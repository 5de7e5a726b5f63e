"""One run of four ranks, started on two hosts in every way, and on one.

Invariant: how and where ranks are started does not change one bit of what they compute. A breach would show as a loss that
differs in its last digits, because ranks or sums are in another order, or as a run that never begins, because a rank waits at
an address that only its own host knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.host_runs import STEPS, Commands, by_deepspeed, by_hand, by_ssh, on_each, rows, settings
from support.hosts import Host, Hosts, needs_sshd, unavailable
from support.launches import dist_mtp, train

REASON = needs_sshd() or unavailable("pdsh")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

NODE_TIMEOUT_S = 5.0
KILL_S = 8.0
"""For the beat that was on its way, the stacks of ranks that hang, and their end on a busy machine."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("multinode")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    """Two hosts whose own names mean 127.0.1.1 to themselves, as on a freshly installed Debian."""
    with Hosts(2, rate_mbit=1000, latency_ms=0.2, own_name="loopback") as cluster:
        cluster.start_sshd()
        yield cluster


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, float]]:
    """Metrics of the run on one host without a network."""
    ended = train(dist_mtp(*settings(folder, "alone")), folder / "alone")
    assert ended.code == 0, ended.output
    return rows(folder / "alone")


@pytest.mark.parametrize("start", [by_hand, by_deepspeed])
def test_every_way_to_start_gives_the_same_numbers(
    start: Callable[..., dict[Host, list[str]]], cluster: Hosts, folder: Path, alone: list[dict[str, float]]
) -> None:
    name = start.__name__
    with Commands(cluster, start(cluster, settings(folder, name)), folder, name) as commands:
        ended = commands.end()
        assert {end.code for end in ended.values()} == {0}, commands.output
        assert commands.left_behind(3) == {}
    assert rows(folder / name) == alone


def test_a_cut_link_is_named_and_the_run_goes_on_when_it_is_back(
    cluster: Hosts, folder: Path, alone: list[dict[str, float]]
) -> None:
    """Begun by one command on each host, which both notice the silence; continued by one command for all."""
    lost = cluster.hosts[1]
    overrides = settings(folder, "cut", f"launcher.node_timeout_s={NODE_TIMEOUT_S}")
    with Commands(cluster, on_each(cluster, overrides), folder, "cut") as commands:
        commands.wait_for_step(folder / "cut", STEPS // 2)
        cluster.cut(lost)
        began = time.monotonic()
        ended = commands.end(60)
        assert commands.left_behind(0) == {}
    assert len(rows(folder / "cut")) < STEPS, "the run was over before the link was cut"
    for host, other in (cluster.hosts, cluster.hosts[::-1]):
        assert ended[host].code == 5, commands.output
        assert ended[host].ended_at - began < NODE_TIMEOUT_S + KILL_S, commands.output
        assert f"no sign of life from node {other.number} ({other.name}, {other.address})" in ended[host].output
        assert f"the link between {host.name} and {other.name} is broken" in ended[host].output

    cluster.restore(lost)
    with Commands(cluster, by_ssh(cluster, overrides), folder, "resumed") as commands:
        (resumed,) = commands.end().values()
        assert resumed.code == 0, resumed.output
        assert commands.left_behind(3) == {}
    assert "resumed after step" in resumed.output, "it began anew"
    assert rows(folder / "cut") == alone
