"""``dist-mtp doctor``: check this machine, and the hosts of a run, and say what to fix."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from dist_mtp.cli.compose import compose
from dist_mtp.cli.gpus import visible_gpus
from dist_mtp.config import Config
from dist_mtp.config_checks import use_cuda_for
from dist_mtp.data.tokenizers import tokenizer_vocab_size
from dist_mtp.doctor.accelerators import accelerator_findings, adapter_ports, listed_gpus
from dist_mtp.doctor.all_reduce import (
    check_all_reduce,
    check_deepspeed_imports,
    check_torch_sees_gpus,
    try_all_reduce,
)
from dist_mtp.doctor.finding import Finding, split_fix, table
from dist_mtp.doctor.hosts import OWN_FINDINGS, host_findings
from dist_mtp.doctor.network import network_findings
from dist_mtp.doctor.software import software_findings
from dist_mtp.doctor.system import existing_folder, system_findings
from dist_mtp.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from dist_mtp.launch.agent import is_this_machine
from dist_mtp.launch.cluster import Cluster, plan_cluster
from dist_mtp.launch.hosts import named_nodes
from dist_mtp.pipeline.costs import num_parameters

_STATE_BYTES = {"fp32": 4 + 2 * 4, "bf16": 4 + 2 * 2}
"""Of one parameter in a checkpoint, by ``optim.moment_dtype``: fp32 weight and two moments."""


def main(arguments: list[str]) -> int:
    """``dist-mtp doctor [overrides]``: exit code 2 if something would keep this configuration from training."""
    overrides = [argument for argument in arguments if argument != OWN_FINDINGS]
    config = compose(overrides)
    if OWN_FINDINGS in arguments:
        print(json.dumps([dataclasses.asdict(finding) for finding in own_findings(config)]))
        return EXIT_DONE
    findings = [*own_findings(config), *_others(config, overrides)]
    print("\n".join(table(findings)))
    return EXIT_CONFIG if any(finding.level == "error" for finding in findings) else EXIT_DONE


def own_findings(config: Config) -> list[Finding]:
    """Of this machine."""
    gpus, listed = len(visible_gpus()), listed_gpus()
    several_nodes = config.launcher.nodes > 1 or bool(_named(config))
    cluster, problem = _cluster(config, gpus) if several_nodes else (None, [])
    ranks = cluster.ranks_per_node if cluster is not None else config.world_size
    on_cpu = not gpus or config.device == "cpu" or not _would_use_gpus(config, ranks, gpus)
    ports = adapter_ports()
    return [
        *software_findings(config),
        *accelerator_findings(ranks, gpus, listed, config.device, ports, several_nodes=several_nodes),
        *_exchange(config, gpus, listed),
        *network_findings(
            config.launcher, several_nodes=several_nodes, nodes_meet_here=several_nodes and _meet_here(config)
        ),
        *problem,
        *system_findings(
            config,
            ranks,
            _checkpoint_bytes(config),
            on_cpu=on_cpu,
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
    return host_findings(others, config.launcher.ssh_config, existing_folder(Path(config.run_dir)), overrides)


def _named(config: Config) -> list[str]:
    return [node.host for node in named_nodes(config.launcher.hosts, config.launcher.hostfile)]


def _meet_here(config: Config) -> bool:
    """Whether this machine is the first node of several, whose port the others connect to."""
    if config.launcher.name == "slurm":  # it is the job's first host that listens
        return False
    first = config.launcher.rendezvous or next(iter(_named(config)), None)
    return first is not None and is_this_machine(first.partition(":")[0])


def _exchange(config: Config, gpus: int, listed: int) -> list[Finding]:
    """Collectives between processes of this machine, tried out."""
    gloo = try_all_reduce("gloo", 2, config.launcher)
    expected = gpus if "CUDA_VISIBLE_DEVICES" in os.environ else listed
    seen = gloo.answer.get("gpus")
    findings = [
        check_deepspeed_imports(gloo.answer.get("deepspeed")),
        check_all_reduce("gloo", gloo),
        check_torch_sees_gpus(expected, seen, device=config.device),
    ]
    if seen and config.device != "cpu":
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
