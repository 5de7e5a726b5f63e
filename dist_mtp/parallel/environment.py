"""Environment variables of a rank: where it stands in the world, and through which network it talks.

Set by the rank itself, before torch is imported, so that they are the same under every launcher and no value travels
through anybody's shell. A variable that the user has exported wins over what is chosen here, ``launcher.environment`` over
both.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import MutableMapping

import psutil

from dist_mtp.config import LauncherConfig
from dist_mtp.errors import ConfigError

Environment = MutableMapping[str, str]

_OPENMPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
"""What mpirun calls torch's variables."""


def prepare_environment(env: Environment, launcher: LauncherConfig, master: tuple[str, int] | None = None) -> None:
    """Complete what the launcher has set; call it before torch is imported.

    Args:
        master: host and port of rank 0, for launchers that do not say it in the environment (mpirun).

    Raises:
        ConfigError: ``launcher.interface`` does not exist here.
    """
    env.update(launcher.environment)
    # torch takes every core for every rank otherwise; torchrun sets 1 as well, deepspeed and mpirun do not.
    env.setdefault("OMP_NUM_THREADS", str(launcher.threads_per_rank))
    if "RANK" not in env and "OMPI_COMM_WORLD_RANK" in env:
        env.update({name: env[openmpi] for name, openmpi in _OPENMPI.items()})
    if master is not None:
        env.setdefault("MASTER_ADDR", master[0])
        env.setdefault("MASTER_PORT", str(master[1]))
    _be_alone(env)
    _choose_interface(env, launcher.interface)


def _be_alone(env: Environment) -> None:
    """One process without a launcher is a world of one."""
    if "RANK" in env:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _choose_interface(env: Environment, named: str | None) -> None:
    """Tell gloo and NCCL which network to use.

    Left alone, gloo takes the address that this host's own name resolves to, on many systems 127.0.1.1, and tells it to
    its peers; NCCL takes the first interface that is up, on machines with containers often a bridge to nowhere. NCCL only
    meets through it: data goes over InfiniBand where there is any.
    """
    interfaces = psutil.net_if_addrs()
    if named is not None and named not in interfaces:
        raise ConfigError(
            f"launcher.interface={named} does not exist on {socket.gethostname()}, which has {', '.join(interfaces)}: name one "
            "that all nodes have, or leave it null"
        )
    address = _own_address(env.get("MASTER_ADDR", "127.0.0.1"))
    is_single_node = env.get("WORLD_SIZE") == (env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE"))
    chosen = named or _interface_of(address)
    if named is None and not is_single_node and (address is None or address.startswith("127.")):
        chosen = _only_interface()
    if chosen is None:
        return
    env.setdefault("GLOO_SOCKET_IFNAME", chosen)
    if not is_single_node:  # within one machine NCCL's own choice is never wrong
        env.setdefault("NCCL_SOCKET_IFNAME", chosen)


def _own_address(master: str) -> str | None:
    """This machine's address on the way to ``master``; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((master, 9))
        return str(probe.getsockname()[0])
    return None


def _interface_of(address: str | None) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            return name
    if address is not None and address.startswith("127."):
        return _interface_of("127.0.0.1") if address != "127.0.0.1" else None
    return None


def _only_interface() -> str | None:
    """The interface to other machines, if there is no choice."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    candidates = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
        and any(known.family == socket.AF_INET and not known.address.startswith("127.") for known in addresses)
    ]
    return candidates[0] if len(candidates) == 1 else None
