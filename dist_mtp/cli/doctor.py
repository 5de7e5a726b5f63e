"""``dist-mtp doctor``: check this machine, and the hosts of a run, and say what to fix."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from dist_mtp.cli.compose import compose
from dist_mtp.cli.gpus import visible_gpus
from dist_mtp.config import Config, resolve
from dist_mtp.config_checks import use_cuda_for
from dist_mtp.data.tokenizers import tokenizer_vocab_size
from dist_mtp.doctor.accelerators import accelerator_findings, listed_gpus
from dist_mtp.doctor.all_reduce import check_all_reduce, check_torch_sees_gpus, try_all_reduce
from dist_mtp.doctor.finding import Finding, table
from dist_mtp.doctor.hosts import OWN_FINDINGS, host_findings
from dist_mtp.doctor.network import network_findings
from dist_mtp.doctor.software import software_findings
from dist_mtp.doctor.system import existing_folder, system_findings
from dist_mtp.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from dist_mtp.launch.cluster import plan_cluster
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
    launcher, gpus = config.launcher, len(visible_gpus())
    several_nodes = launcher.nodes > 1 or bool(launcher.hosts) or launcher.hostfile is not None
    ranks, problem = _ranks_here(config, gpus, several_nodes=several_nodes)
    on_cpu = not gpus or config.device == "cpu" or not _would_use_gpus(config, ranks, gpus)
    accelerators = accelerator_findings(ranks, config.device, several_nodes=several_nodes)
    has_infiniband = any(finding.name == "InfiniBand" and finding.level == "ok" for finding in accelerators)
    return [
        *software_findings(config),
        *accelerators,
        *_exchange(gpus, config.device),
        *network_findings(launcher, several_nodes=several_nodes),
        *problem,
        *system_findings(
            config,
            ranks,
            _checkpoint_bytes(config),
            on_cpu=on_cpu,
            several_nodes=several_nodes,
            has_infiniband=has_infiniband,
        ),
    ]


def _others(config: Config, overrides: Sequence[str]) -> list[Finding]:
    """Of the named hosts that are not this machine."""
    from dist_mtp.launch.agent import is_this_machine

    nodes = named_nodes(config.launcher.hosts, config.launcher.hostfile)
    hosts = [node.host for node in nodes if not is_this_machine(node.host)]
    if not hosts:
        return []
    return host_findings(hosts, config.launcher.ssh_config, existing_folder(Path(config.run_dir)), overrides)


def _exchange(gpus: int, device: str) -> list[Finding]:
    """Collectives between processes of this machine, tried out."""
    gloo = try_all_reduce("gloo", 2)
    seen = gloo.answer.get("gpus")
    listed = gpus if "CUDA_VISIBLE_DEVICES" in os.environ else listed_gpus()
    findings = [check_all_reduce("gloo", gloo), check_torch_sees_gpus(listed, seen, device=device)]
    if seen and device != "cpu":
        findings.append(check_all_reduce("nccl", try_all_reduce("nccl", min(2, seen))))
    return [finding for finding in findings if finding is not None]


def _ranks_here(config: Config, gpus: int, *, several_nodes: bool) -> tuple[int, list[Finding]]:
    """Ranks that this machine would start, and why that is not known."""
    if not several_nodes:
        return config.world_size, []
    try:
        return plan_cluster(config, gpus=gpus).ranks_per_node, []
    except ConfigError as error:
        what, _, fix = str(error).rpartition(": ")
        return max(gpus, 1), [Finding("ranks", "error", what, fix)]


def _would_use_gpus(config: Config, ranks: int, gpus: int) -> bool:
    return config.device == "cuda" or use_cuda_for(config.device, local_ranks=ranks, gpus=gpus)


def _checkpoint_bytes(config: Config) -> int:
    resolved = resolve(config, vocab_size=tokenizer_vocab_size(config.tokenizer))
    return num_parameters(resolved) * _STATE_BYTES[config.optim.moment_dtype]
