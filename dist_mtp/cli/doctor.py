"""``dist-mtp doctor``: check this machine, and the hosts of a run, and say what to fix."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from dist_mtp.cli.compose import compose
from dist_mtp.cli.gpus import chosen_gpus, driver_gpus, torch_uses_gpus
from dist_mtp.config import Config
from dist_mtp.config_checks import use_cuda_for
from dist_mtp.data.tokenizers import tokenizer_vocab_size
from dist_mtp.doctor import network, system
from dist_mtp.doctor.accelerators import accelerator_findings, adapter_ports
from dist_mtp.doctor.all_reduce import (
    check_all_reduce,
    check_deepspeed_imports,
    check_torch_sees_gpus,
    try_all_reduce,
)
from dist_mtp.doctor.finding import Finding, split_fix, table
from dist_mtp.doctor.hosts import OWN_FINDINGS, host_findings
from dist_mtp.doctor.meeting import way_findings
from dist_mtp.doctor.software import software_findings
from dist_mtp.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from dist_mtp.launch.cluster import Cluster, plan_cluster
from dist_mtp.launch.hosts import is_this_machine, named_nodes
from dist_mtp.launch.remote import ssh_command
from dist_mtp.launcher_checks import parse_endpoint
from dist_mtp.pipeline.costs import num_parameters

_STATE_BYTES = {"fp32": 4 + 2 * 4, "bf16": 4 + 2 * 2}
"""Of one parameter in a checkpoint, by ``optim.moment_dtype``: fp32 weight and two moments."""


def main(arguments: list[str]) -> int:
    """``dist-mtp doctor [overrides]``: exit code 2 if something would keep this configuration from training."""
    overrides = [argument for argument in arguments if argument != OWN_FINDINGS]
    config = compose(overrides)
    if OWN_FINDINGS in arguments:
        # Asked as one of the hosts, whose name may be one that only the asking machine's ssh knows.
        print(json.dumps([dataclasses.asdict(finding) for finding in own_findings(config, trains_here=True)]))
        return EXIT_DONE
    findings = [*own_findings(config, trains_here=_trains_here(config)), *_others(config, overrides)]
    print("\n".join(table(findings)))
    return EXIT_CONFIG if any(finding.level == "error" for finding in findings) else EXIT_DONE


def own_findings(config: Config, *, trains_here: bool) -> list[Finding]:
    """Of this machine.

    Args:
        trains_here: else it only starts the run on others, and what ranks need is not looked for.
    """
    listed = driver_gpus()
    chosen = chosen_gpus(listed, os.environ.get("CUDA_VISIBLE_DEVICES"))
    usable = len(chosen) if torch_uses_gpus() else 0
    several_nodes = config.launcher.nodes > 1 or bool(_named(config))
    cluster, problem = _cluster(config, usable) if several_nodes else (None, [])
    ports = adapter_ports() if trains_here else []
    found = software_findings(config)
    if trains_here:
        ranks = cluster.ranks_per_node if cluster is not None else config.world_size
        on_cpu = not usable or config.device == "cpu" or not _would_use_gpus(config, ranks, usable)
        found += accelerator_findings(
            ranks,
            usable,
            config.device,
            ports,
            several_nodes=several_nodes,
            has_driver=bool(listed),
            chosen=[gpu.index for gpu in chosen],
            is_divided=any(gpu.is_divided for gpu in chosen),
        )
        found += network.node_findings(
            config.launcher,
            several_nodes=several_nodes,
            nodes_meet_here=several_nodes and _meet_here(config),
            starts_alone=not _named(config),
        )
        found += system.node_findings(config, ranks, on_cpu=on_cpu)
    else:
        found.append(_not_trained_here(config))
    return [
        *found,
        *_exchange(config, len(chosen), tries_gpus=trains_here),
        *network.network_findings(),
        *problem,
        *system.system_findings(
            config,
            _checkpoint_bytes(config),
            several_nodes=several_nodes,
            has_infiniband=any(port.is_active for port in ports),
        ),
    ]


def _others(config: Config, overrides: Sequence[str]) -> list[Finding]:
    """Of the named hosts that are not this machine."""
    hosts = _named(config)
    others = [host for host in hosts if not is_this_machine(host)]
    if not others:
        return []
    if config.launcher.hostfile is not None:  # which the others need not have
        overrides = [*overrides, "launcher.hostfile=null", f"launcher.hosts=[{','.join(hosts)}]"]
        cluster, _ = _cluster(config, gpus=0)
        if cluster is not None:
            overrides = [*overrides, f"launcher.ranks_per_node={cluster.ranks_per_node}"]
    ssh_config, folder = config.launcher.ssh_config, system.existing_folder(Path(config.run_dir))
    endpoint = parse_endpoint(config.launcher.rendezvous or hosts[0])

    def command(host: str, argv: Sequence[str]) -> list[str]:
        return list(argv) if host not in others else ssh_command(host, ssh_config, argv)

    def try_way(reached: Sequence[str]) -> list[Finding]:
        there = [host for host in hosts if host in reached or host not in others]
        if hosts[0] not in there or len(there) < 2:
            return []  # what was not reached is an error already
        return way_findings(there, endpoint, command)

    return host_findings(others, ssh_config, folder, overrides, try_way=try_way)


def _trains_here(config: Config) -> bool:
    """Whether ranks would run on this machine."""
    hosts = _named(config)
    return config.launcher.name != "slurm" and (not hosts or any(map(is_this_machine, hosts)))


def _not_trained_here(config: Config) -> Finding:
    where = "nodes that Slurm chooses" if config.launcher.name == "slurm" else "the named hosts"
    what = f"ranks run on {where}, not here: GPUs, NCCL, CPU, /dev/shm, interfaces and the rendezvous port were not checked"
    return Finding("this machine", "note", what)


def _named(config: Config) -> list[str]:
    return [node.host for node in named_nodes(config.launcher.hosts, config.launcher.hostfile)]


def _meet_here(config: Config) -> bool:
    """Whether this machine is the first node of several, whose port the others connect to."""
    first = config.launcher.rendezvous or next(iter(_named(config)), None)
    return first is not None and is_this_machine(first.partition(":")[0])


def _exchange(config: Config, chosen: int, *, tries_gpus: bool) -> list[Finding]:
    """Collectives between processes of this machine, tried out.

    Args:
        chosen: GPUs that torch should see.
    """
    launcher = config.launcher if tries_gpus else dataclasses.replace(config.launcher, interface=None)
    gloo = try_all_reduce("gloo", 2, launcher)
    seen = gloo.answer.get("gpus")
    findings = [check_deepspeed_imports(gloo.answer.get("deepspeed")), check_all_reduce("gloo", gloo)]
    if tries_gpus:
        findings.append(check_torch_sees_gpus(chosen, seen, device=config.device))
    if tries_gpus and seen and config.device != "cpu":
        findings.append(check_all_reduce("nccl", try_all_reduce("nccl", min(2, seen), config.launcher)))
    return [finding for finding in findings if finding is not None]


def _cluster(config: Config, gpus: int) -> tuple[Cluster | None, list[Finding]]:
    """Nodes and ranks, or why they are not known."""
    try:
        return plan_cluster(config, gpus=gpus), []
    except ConfigError as error:
        return None, [Finding("ranks", "error", *split_fix(str(error)))]


def _would_use_gpus(config: Config, ranks: int, gpus: int) -> bool:
    return config.device == "cuda" or use_cuda_for(config.device, local_ranks=ranks, gpus=gpus)


def _checkpoint_bytes(config: Config) -> int:
    """Of all ranks together, however many there are."""
    rows = config.model.vocab_size or tokenizer_vocab_size(config.tokenizer)
    sized = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=rows))
    return num_parameters(sized) * _STATE_BYTES[config.optim.moment_dtype]
