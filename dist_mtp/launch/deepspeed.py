"""Ranks started by DeepSpeed's launcher, on this machine or on several.

DeepSpeed 0.19.8 builds command lines for remote shells itself: it exports variables in double quotes, so that a shell on
every node would run ``$(...)`` in them, takes lines of its hostfile for ssh's options, and splits arguments at blanks.
Everything that it will pass on is therefore checked here first.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from dist_mtp.config import Config
from dist_mtp.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RANK_FAILURE, ConfigError
from dist_mtp.launch.cluster import Cluster
from dist_mtp.launch.command import rank_arguments
from dist_mtp.launch.facts import compare_facts, token_file
from dist_mtp.launch.outcome import STOPPED, Outcome, report
from dist_mtp.launch.ranks import RANK_MODULE
from dist_mtp.launch.remote import gather_facts
from dist_mtp.launch.torchrun import endpoint
from dist_mtp.launcher_checks import check_value
from dist_mtp.run_folder import CONFIG_FILE

HOSTFILE = "launch/hostfile"
"""In the run folder."""
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "LD_LIBRARY", "PATH")
"""Beginnings of variables that DeepSpeed exports to all nodes: ``EXPORT_ENVS`` in launcher/runner.py, and on GPUs the last
three."""
_PLAIN = re.compile(r"[\w@%+=:,./-]+")
_SHELLS = {"pdsh": "pdsh", "openmpi": "mpirun"}
_DOCUMENTED = (EXIT_DONE, 2, 3, 4, EXIT_RANK_FAILURE, *STOPPED)


def check(config: Config, cluster: Cluster, environment: Mapping[str, str]) -> None:
    """Refuse what DeepSpeed would pass to a shell unquoted, hosts that do not answer, and nodes that differ.

    Raises:
        ConfigError: names the variable, path or host.
    """
    if not cluster.hosts:
        return
    for path in (os.getcwd(), config.run_dir, config.data.cache_dir, sys.executable):
        if not _PLAIN.fullmatch(path):
            raise ConfigError(
                f"launcher=deepspeed passes paths through shells, but {path!r} has blanks or special characters: choose another "
                "folder, or launcher=torchrun"
            )
    for name, value in environment.items():
        if name.startswith(_EXPORTED):
            check_value(name, value)
    for folder in {Path.home(), Path.cwd()}:
        _check_environment_file(folder / environment.get("DS_ENV_FILE", ".deepspeed_env"))
    tool = _SHELLS[config.launcher.remote_shell]
    if shutil.which(tool) is None:
        raise ConfigError(
            f"launcher.remote_shell={config.launcher.remote_shell} needs {tool}, which is not installed on this machine: install "
            "it, or use launcher=torchrun, which needs only ssh"
        )


def check_nodes(config: Config, cluster: Cluster) -> None:
    """Ask every host whether it is there and like the others, and sees the run folder, which must exist, and the first one
    whether the port is free where the ranks will meet.

    Raises:
        ConfigError: names the hosts, both values and the fix.
    """
    if not cluster.hosts:
        return
    token = secrets.token_hex(16)
    proof = token_file(config.run_dir, token)
    proof.touch()
    try:
        folder, port = str(Path(config.run_dir).absolute()), endpoint(config, cluster)[1]
        facts = gather_facts(cluster.hosts, config.launcher.ssh_config, folder, token, port)
    finally:
        proof.unlink()
    if problems := compare_facts(facts):
        raise ConfigError("; ".join(problems))
    if facts[cluster.hosts[0]]["port_free"] is False:
        # DeepSpeed would start all ranks, and those on the other nodes would wait for an answer from who has the port.
        raise ConfigError(
            f"port {port} of {cluster.hosts[0]}, where the ranks shall meet, is in use: end the program that has it, or choose "
            f"another with launcher.rendezvous={endpoint(config, cluster)[0]}:PORT"
        )


def command(config: Config, cluster: Cluster, corpus: Path) -> list[str]:
    """DeepSpeed's command line."""
    arguments = rank_arguments(config, Path(config.run_dir) / CONFIG_FILE, corpus)
    host, port = endpoint(config, cluster)
    start = [sys.executable, "-m", "deepspeed.launcher.runner"]
    module = ["--no_local_rank", "--module", RANK_MODULE, *arguments]
    if not cluster.hosts:
        port = port if config.launcher.rendezvous else _free_port()
        # On GPUs it counts the devices itself and refuses more ranks than there are.
        return [*start, "--num_accelerators", str(cluster.ranks_per_node), "--master_port", str(port), *module]
    # With one host in its hostfile DeepSpeed would start the ranks here, whatever the host.
    where = ["--hostfile", str(Path(config.run_dir) / HOSTFILE), "--force_multi", "--no_ssh_check"]
    how = ["--launcher", config.launcher.remote_shell, "--master_addr", host, "--master_port", str(port)]
    if config.launcher.remote_shell == "openmpi":
        how += ["--launcher_args", " ".join(_mpirun_options(config))]
        module += ["--rendezvous", f"{host}:{port}"]
    return [*start, *where, *how, *module]


def run(config: Config, cluster: Cluster, corpus: Path) -> int:
    """Start all ranks and wait for their end; returns the run's exit code.

    Args:
        config: that of the prepared run folder.

    Raises:
        ConfigError: see :func:`check_nodes`.
    """
    check_nodes(config, cluster)
    hostfile = Path(config.run_dir) / HOSTFILE
    if cluster.hosts:
        hostfile.parent.mkdir(exist_ok=True)
        hostfile.write_text("".join(f"{host} slots={cluster.ranks_per_node}\n" for host in cluster.hosts))
    process = subprocess.Popen(command(config, cluster, corpus), env=_environment(config), start_new_session=True)
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code in _DOCUMENTED and not (received and code == EXIT_CONFIG):
        outcome = Outcome(code, "" if code in (EXIT_DONE, *STOPPED) else f"the run ended with exit code {code}")
    else:
        outcome = Outcome(EXIT_RANK_FAILURE, f"a rank died or hung: DeepSpeed's launcher ended with exit code {code}")
    report(config, outcome)
    return outcome.code


def _environment(config: Config) -> dict[str, str]:
    environment = dict(os.environ)
    if config.device == "cpu" or find_spec("deepspeed") is None:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    if config.launcher.ssh_config is not None:
        environment["PDSH_SSH_ARGS_APPEND"] = f"-F {config.launcher.ssh_config} -o BatchMode=yes"
    return environment


def _mpirun_options(config: Config) -> list[str]:
    options = ["--mca", "btl_tcp_if_include", config.launcher.interface or "eth0"]
    if config.launcher.ssh_config is not None:
        options += ["--mca", "plm_rsh_args", f"'-F {config.launcher.ssh_config}'"]
    if os.geteuid() == 0:
        options.append("--allow-run-as-root")
    return options


def _check_environment_file(file: Path) -> None:
    """Lines ``NAME=VALUE`` that DeepSpeed exports on every node."""
    if not file.is_file():
        return
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        name, _, value = line.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
            raise ConfigError(
                f"{file}, line {number}: {line!r} is not NAME=VALUE: correct it, or use launcher.environment"
            )
        check_value(f"{name} in {file}", value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
