"""Environment of a rank: complete under every launcher, and never against what its user has exported."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from dist_mtp.config import LauncherConfig
from dist_mtp.errors import ConfigError
from dist_mtp.parallel import environment
from dist_mtp.parallel.environment import prepare_environment

LOOPBACK = {"lo": "127.0.0.1"}
ONE = {**LOOPBACK, "eth0": "10.0.0.5"}
SEVERAL = {**ONE, "docker0": "172.17.0.1", "ib0": "192.168.7.5"}


def torchrun(master: str = "127.0.0.1", nodes: int = 1) -> dict[str, str]:
    """As torchrun sets it for a rank of two on each node."""
    place = {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": str(2 * nodes)}
    return {**place, "MASTER_ADDR": master, "MASTER_PORT": "29501"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Call it with addresses by interface, and the one that leads to the first node."""

    def pretend(addresses: dict[str, str], own: str | None = "127.0.0.1", down: tuple[str, ...] = ()) -> None:
        found = {name: [SimpleNamespace(family=socket.AF_INET, address=ip)] for name, ip in addresses.items()}
        states = {name: SimpleNamespace(isup=name not in down) for name in addresses}
        monkeypatch.setattr(environment.psutil, "net_if_addrs", lambda: found)
        monkeypatch.setattr(environment.psutil, "net_if_stats", lambda: states)
        monkeypatch.setattr(environment, "_own_address", lambda master: own)

    return pretend


class TestPlace:
    def test_alone(self) -> None:
        """A world of one on a port that is free."""
        env: dict[str, str] = {}
        prepare_environment(env, LauncherConfig())
        assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) == ("0", "1", "0", "1")
        with socket.create_server((env["MASTER_ADDR"], int(env["MASTER_PORT"]))):
            pass

    def test_under_mpirun(self) -> None:
        """Its names are translated, and the first node is what the launcher says."""
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        env = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(names, "5812", strict=True)}
        prepare_environment(env, LauncherConfig(), ("127.0.0.1", 29511))
        found = [env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
        assert found == ["5", "8", "1", "2"], env
        assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", "29511")

    def test_of_torchrun_stays(self) -> None:
        """Inside an mpirun, too."""
        env = {**torchrun(), "OMPI_COMM_WORLD_RANK": "7"}
        prepare_environment(env, LauncherConfig(), ("elsewhere", 1))
        assert env.items() >= torchrun().items(), env


def test_threads() -> None:
    for exported, expected in ((None, "3"), ("7", "7")):
        env = torchrun() | ({} if exported is None else {"OMP_NUM_THREADS": exported})
        prepare_environment(env, LauncherConfig(threads_per_rank=3))
        assert env["OMP_NUM_THREADS"] == expected


def test_variables_of_the_configuration() -> None:
    """They are what was asked for in this run, so they win over what the shell happened to export."""
    env = {**torchrun(), "NCCL_DEBUG": "WARN"}
    prepare_environment(env, LauncherConfig(environment={"NCCL_DEBUG": "INFO", "A": "$(id)"}))
    assert (env["NCCL_DEBUG"], env["A"]) == ("INFO", "$(id)")


class TestInterface:
    """gloo and NCCL take the one that leads to the first node, and none rather than a wrong one."""

    @pytest.mark.parametrize(
        ("addresses", "own", "nodes", "expected"),
        [
            (SEVERAL, "127.0.0.1", 1, ("lo", None)),
            (SEVERAL, "127.0.1.1", 1, ("lo", None)),
            (SEVERAL, "10.0.0.5", 2, ("eth0", "eth0")),
            (SEVERAL, "192.168.7.5", 2, ("ib0", "ib0")),
            (ONE, "127.0.1.1", 2, ("eth0", "eth0")),  # the first node, whose name is that of its loopback
            (SEVERAL, "127.0.1.1", 2, (None, None)),
            (ONE, None, 2, ("eth0", "eth0")),  # the first node's name does not resolve here
            (LOOPBACK, None, 2, (None, None)),
        ],
    )
    def test_is_chosen(self, addresses, own, nodes, expected, machine) -> None:
        machine(addresses, own)
        env = torchrun(nodes=nodes)
        prepare_environment(env, LauncherConfig())
        assert (env.get("GLOO_SOCKET_IFNAME"), env.get("NCCL_SOCKET_IFNAME")) == expected

    def test_that_is_down_does_not_count(self, machine) -> None:
        machine(SEVERAL, "127.0.1.1", down=("docker0", "ib0"))
        env = torchrun(nodes=2)
        prepare_environment(env, LauncherConfig())
        assert env["GLOO_SOCKET_IFNAME"] == "eth0"

    def test_named_or_exported(self, machine) -> None:
        """Whichever is named is taken; what is exported stays."""
        machine(SEVERAL, "10.0.0.5")
        env = {**torchrun(nodes=2), "NCCL_SOCKET_IFNAME": "=ib0,ib1"}
        prepare_environment(env, LauncherConfig(interface="docker0"))
        assert (env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == ("docker0", "=ib0,ib1")

    def test_unknown(self, machine) -> None:
        machine(ONE)
        with pytest.raises(ConfigError, match=r"launcher\.interface=eth9 does not exist on .*, which has lo, eth0"):
            prepare_environment(torchrun(), LauncherConfig(interface="eth9"))
