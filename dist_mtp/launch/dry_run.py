"""What a launcher would start, in the words of a shell."""

from __future__ import annotations

from pathlib import Path

from dist_mtp.config import Config
from dist_mtp.launch import deepspeed, slurm, torchrun
from dist_mtp.launch.cluster import Cluster
from dist_mtp.launch.command import rank_arguments, shown
from dist_mtp.launch.ranks import RANK_MODULE
from dist_mtp.run_folder import CONFIG_FILE

CORPUS = Path("CORPUS")
"""Stands for the folder that preparing the corpus would tell."""


def dry_run(config: Config, cluster: Cluster | None, min_nodes: int | None = None) -> str:
    """Commands that start the run.

    Args:
        config: resolved.
        cluster: None for the launchers of one machine.
        min_nodes: nodes that suffice.
    """
    if config.launcher.name == "slurm":
        script = Path(config.run_dir) / slurm.SCRIPT
        return (
            f"{shown(['sbatch', '--parsable', str(script)])}\n\n{slurm.job_script(config, CORPUS, min_nodes=min_nodes)}"
        )
    arguments = rank_arguments(config, Path(config.run_dir) / CONFIG_FILE, CORPUS)
    if cluster is None:
        if config.launcher.name == "none":
            return shown(["python", "-m", RANK_MODULE, *arguments])
        local = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
        return shown(["torchrun", *local, "--nproc-per-node", str(config.world_size), "-m", RANK_MODULE, *arguments])
    if config.launcher.name == "deepspeed":
        return shown(deepspeed.command(config, cluster, CORPUS))
    host, port = torchrun.endpoint(config, cluster)
    ranks = f"--nproc-per-node {cluster.ranks_per_node}"
    starts = torchrun.node_commands(config, cluster)
    lines = [f"on {name}: {shown(command)}" for name, command in zip(cluster.hosts, starts, strict=True)]
    return "\n".join(
        [
            *(lines or [f"this command on each of {cluster.nodes} nodes; they meet at {host}:{port}"]),
            "after roll call every node starts",
            shown(["torchrun", "--nnodes", str(cluster.nodes), "--node-rank", "K", "--master-addr", host])
            + f" --master-port PORT {ranks} -m {RANK_MODULE} {shown(arguments)}",
        ]
    )
