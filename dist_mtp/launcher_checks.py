"""What ``launcher.*`` must satisfy. Its values reach shells and other machines, so nothing is left to their quoting."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dist_mtp.errors import ConfigError

if TYPE_CHECKING:
    from dist_mtp.config import Config, LauncherConfig

DEFAULT_PORT = 29500

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(\.{_LABEL})*")  # underscores stand in names that ssh's configuration file defines
_PORT = re.compile(r"[0-9]{1,5}")
_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]{0,31}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SET_HERE = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
}
"""Variables that the launchers set, or that a key of their own sets."""
_READ_AT_START = ("LD_", "PYTHON", "MALLOC_", "GLIBC_TUNABLES")
"""Beginnings of names that Python and the C library look at once, before a rank has read its configuration."""


def check_launcher(config: Config) -> None:
    """Refuse what no launcher can do, and whatever a shell could take for something else.

    Raises:
        ConfigError: names the key, the value and the fix.
    """
    launcher = config.launcher
    _check_ranges(launcher)
    _check_fits_launcher(config)
    for host in launcher.hosts:
        check_host(host, "launcher.hosts")
    if launcher.rendezvous is not None:
        parse_endpoint(launcher.rendezvous)
    if launcher.interface is not None and not _INTERFACE.fullmatch(launcher.interface):
        raise ConfigError(
            f"launcher.interface={launcher.interface!r} is not the name of a network interface: write one such as eth0, or null"
        )
    for key in ("hostfile", "ssh_config"):
        path = getattr(launcher, key)
        if path is not None and (not path.isprintable() or path.startswith("-") or not path.strip()):
            raise ConfigError(
                f"launcher.{key}={path!r} is not the path of a file: write one without control characters, ./ before a dash"
            )
    for name, value in launcher.environment.items():
        _check_variable(name, value)


def check_host(host: str, where: str) -> None:
    """A host is a name or an IPv4 address, never an option of ssh or a piece of a shell's command.

    Raises:
        ConfigError: names ``where`` it stands.
    """
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise ConfigError(
            f"{where}: {host!r} is not a host: write letters, digits, dots, dashes and underscores, beginning with a letter or a digit "
            "(users, ports and keys belong into ssh's configuration file)"
        )


def parse_endpoint(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; a host alone means port 29500.

    Raises:
        ConfigError: it is something else.
    """
    host, colon, port = text.partition(":")
    check_host(host, "launcher.rendezvous")
    if not colon:
        return host, DEFAULT_PORT
    if not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise ConfigError(
            f"launcher.rendezvous={text!r} has port {port!r}: write HOST:PORT with a port from 1 to 65535"
        )
    return host, int(port)


def check_value(name: str, value: str) -> None:
    """An environment variable's value is passed on literally, and some launchers pass it through shells.

    Raises:
        ConfigError: a shell could run it, or it has several lines.
    """
    if not value.isprintable():
        raise ConfigError(f"environment variable {name}={value!r} has a newline or control character: remove it")
    found = next((sign for sign in ("$", "`", '"', "'", "\\", ";", "&", "|", "<", ">") if sign in value), None)
    if found is not None:
        raise ConfigError(
            f"environment variable {name}={value!r} holds {found}, which a shell on the way to the nodes could run: write the "
            "value out"
        )


def _check_variable(name: str, value: str) -> None:
    if not VARIABLE.fullmatch(name):
        raise ConfigError(
            f"launcher.environment: {name!r} is not the name of an environment variable: write letters, digits and "
            "underscores, beginning with no digit"
        )
    if name in _SET_HERE:
        own = {"OMP_NUM_THREADS": "launcher.threads_per_rank"}.get(name)
        own = own or ("launcher.interface" if name.endswith("IFNAME") else None)
        raise ConfigError(
            f"launcher.environment sets {name}, which the launcher sets itself: {f'use {own}' if own else 'remove it'}"
        )
    if name.startswith(_READ_AT_START):
        raise ConfigError(
            f"launcher.environment sets {name}, which is read before a rank could set it: export it where ranks are started, "
            "such as in ~/.bashrc of every node"
        )
    check_value(name, value)


def _check_ranges(launcher: LauncherConfig) -> None:
    whole = {
        "nodes": launcher.nodes,
        "min_nodes": launcher.min_nodes,
        "ranks_per_node": launcher.ranks_per_node,
        "threads_per_rank": launcher.threads_per_rank,
    }
    for key, number in whole.items():
        if number is not None and number < 1:
            raise ConfigError(f"launcher.{key}={number} must be at least 1")
    for key, seconds in {"join_timeout_s": launcher.join_timeout_s, "node_timeout_s": launcher.node_timeout_s}.items():
        if seconds <= 0:
            raise ConfigError(f"launcher.{key}={seconds:g} must be greater than 0")
    if launcher.node_timeout_s < 3:
        raise ConfigError(
            f"launcher.node_timeout_s={launcher.node_timeout_s:g} is too short, nodes show signs of life every second: at least 3"
        )
    if launcher.hosts and launcher.hostfile is not None:
        raise ConfigError("launcher.hosts and launcher.hostfile both name the nodes: give one of them")
    if launcher.node_rank is not None and not 0 <= launcher.node_rank < launcher.nodes:
        raise ConfigError(
            f"launcher.node_rank={launcher.node_rank} must be between 0 and {launcher.nodes - 1}, as launcher.nodes={launcher.nodes}"
        )


def _check_fits_launcher(config: Config) -> None:
    """Keys that the chosen launcher would not look at are mistakes."""
    launcher, name = config.launcher, config.launcher.name
    named = bool(launcher.hosts) or launcher.hostfile is not None
    among_nodes = launcher.node_rank is not None or launcher.min_nodes is not None
    if name in ("local", "none") and (launcher.nodes > 1 or named or launcher.rendezvous or among_nodes):
        raise ConfigError(
            f"launcher={name} starts ranks on this machine only: for several nodes set launcher=torchrun, deepspeed or slurm"
        )
    if name == "torchrun" and launcher.nodes > 1 and not named and launcher.rendezvous is None:
        raise ConfigError(
            f"launcher.nodes={launcher.nodes} needs launcher.rendezvous=HOST:PORT, the node where the others announce themselves, "
            "or launcher.hosts=[...] to start all of them from here by ssh"
        )
    if named and launcher.node_rank is not None:
        raise ConfigError(
            "launcher.node_rank is for one command per node, but launcher.hosts or hostfile starts all: remove it"
        )
    if name == "slurm" and (named or launcher.rendezvous or launcher.node_rank is not None):
        raise ConfigError(
            "launcher=slurm learns hosts from Slurm: remove launcher.hosts, hostfile, rendezvous and node_rank"
        )
    if name == "deepspeed" and (launcher.nodes > 1 and not named):
        raise ConfigError(
            "launcher=deepspeed finds several nodes in launcher.hostfile: give that file, or launcher.hosts=[...]"
        )
    if name == "deepspeed" and among_nodes:
        raise ConfigError(
            "launcher.min_nodes and node_rank do not work with launcher=deepspeed, which starts all hosts: use torchrun"
        )
    if launcher.min_nodes is not None:
        if not named and launcher.min_nodes > launcher.nodes:
            raise ConfigError(f"launcher.min_nodes={launcher.min_nodes} exceeds launcher.nodes={launcher.nodes}")
        if config.parallel.dp is not None and config.parallel.dp > 1:
            raise ConfigError(
                f"launcher.min_nodes={launcher.min_nodes} lets the nodes that come decide parallel.dp, but it is set to "
                f"{config.parallel.dp}: leave parallel.dp=null"
            )
        if launcher.ranks_per_node is None:
            raise ConfigError(
                "launcher.min_nodes needs launcher.ranks_per_node, as the number of ranks is not known before"
            )
    reads_slurm = launcher.slurm != type(launcher.slurm)()
    if reads_slurm and name != "slurm":
        raise ConfigError(f"launcher.slurm.* has no effect with launcher={name}: set launcher=slurm, or remove it")
