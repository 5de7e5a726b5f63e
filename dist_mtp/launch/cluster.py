"""How many nodes and ranks a run has, decided before anything is started."""

from __future__ import annotations

import dataclasses

from dist_mtp.config import Config
from dist_mtp.errors import ConfigError
from dist_mtp.launch.hosts import Node, is_loopback, named_nodes
from dist_mtp.launcher_checks import DEFAULT_PORT

SEVERAL_NODES = ("torchrun", "deepspeed", "slurm")
"""Launchers that can start ranks on more than one machine."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The nodes that a run asks for."""

    hosts: tuple[str, ...]
    """Empty when the command is given on every node, or a scheduler chooses."""
    nodes: int
    ranks_per_node: int

    is_elsewhere: bool
    """Whether ranks run on machines other than this one, whose devices say nothing about theirs."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def plan_cluster(config: Config, *, gpus: int) -> Cluster:
    """Nodes and ranks of a launcher for several nodes.

    Args:
        gpus: of this machine, taken for what every node has when nothing else says how many ranks to start.

    Raises:
        ConfigError: the numbers contradict each other, or there are none.
    """
    launcher, parallel = config.launcher, config.parallel
    named = named_nodes(launcher.hosts, launcher.hostfile)
    nodes = len(named) or launcher.nodes
    if named and launcher.nodes not in (1, nodes):
        raise ConfigError(f"launcher.nodes={launcher.nodes}, but {nodes} hosts are named: remove launcher.nodes")
    if nodes > 1 and named and is_loopback(named[0].host):
        raise ConfigError(
            f"the first of {nodes} hosts is {named[0].host}, where each of the others would find itself: give this machine's name "
            "or address as the others know it"
        )
    if launcher.min_nodes is not None and launcher.min_nodes > nodes:
        raise ConfigError(f"launcher.min_nodes={launcher.min_nodes} exceeds the {nodes} nodes that are named")
    ranks = launcher.ranks_per_node or _slots(named)
    if ranks is None and parallel.dp is not None:
        world_size = parallel.pp * parallel.dp
        if world_size % nodes:
            raise ConfigError(
                f"parallel.pp={parallel.pp} x parallel.dp={parallel.dp} = {world_size} ranks do not spread evenly over {nodes} "
                "nodes: change parallel.dp, or the number of nodes"
            )
        ranks = world_size // nodes
    if ranks is None and gpus and config.device != "cpu":
        ranks = gpus
    if ranks is None and nodes == 1 and not named:
        ranks = parallel.pp  # one replica, as the local launcher does
    if ranks is None:
        raise ConfigError(
            f"launcher={launcher.name} cannot tell how many ranks each of {nodes} nodes starts: set launcher.ranks_per_node, "
            "slots=N in the hostfile, or parallel.dp"
        )
    if parallel.dp is not None and nodes * ranks != parallel.pp * parallel.dp:
        raise ConfigError(
            f"{nodes} nodes x {ranks} ranks are {nodes * ranks}, but parallel.pp={parallel.pp} x parallel.dp={parallel.dp} needs "
            f"{parallel.pp * parallel.dp}: leave parallel.dp=null to derive it, or change the number of nodes or ranks per node"
        )
    is_elsewhere = bool(named) or launcher.name == "slurm"
    return Cluster(tuple(node.host for node in named), nodes, ranks, is_elsewhere)


def addressed(config: Config, cluster: Cluster) -> Config:
    """With the hosts of ``launcher.hostfile`` and the default rendezvous written out, so that no node needs the file."""
    launcher = dataclasses.replace(config.launcher, nodes=cluster.nodes, hosts=cluster.hosts, hostfile=None)
    if launcher.name == "torchrun" and launcher.rendezvous is None and cluster.hosts:
        launcher = dataclasses.replace(launcher, rendezvous=f"{cluster.hosts[0]}:{DEFAULT_PORT}")
    return dataclasses.replace(config, launcher=launcher)


def settled(config: Config, nodes: int) -> Config:
    """The configuration of a run that has its ``nodes``: equal on all of them, and free of how they were awaited."""
    launcher = dataclasses.replace(config.launcher, nodes=nodes, min_nodes=None, node_rank=None, dry_run=False)
    return dataclasses.replace(config, launcher=launcher)


def _slots(named: tuple[Node, ...]) -> int | None:
    slots = {node.slots for node in named} - {None}
    if len(slots) > 1 or (slots and any(node.slots is None for node in named)):
        text = ", ".join(f"{node.host} {'none' if node.slots is None else node.slots}" for node in named)
        raise ConfigError(f"nodes must have equally many slots, got {text}: every node starts the same number of ranks")
    return next(iter(slots), None)
