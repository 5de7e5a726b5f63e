"""Ranks started by DeepSpeed's launcher, on this machine or on several.

DeepSpeed 0.19.8 builds command lines for remote shells itself: it exports variables in double quotes, so that a shell on
every node would run ``$(...)`` in them, takes lines of its hostfile for ssh's options, and splits arguments at blanks.
Everything that it will pass on is therefore checked here first.

Of signals, its runner (launcher/runner.py:629) passes on none, or with pdsh ends every DeepSpeed run of this user on all
nodes; launcher/launch.py kills ranks after 30 s. So neither gets one from here: :mod:`dist_mtp.launch.warden` tells the ranks
themselves, and when they have ended, so do the processes that started them.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_mtp.config import Config
from dist_mtp.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_RANK_FAILURE, ConfigError
from dist_mtp.launch.cluster import Cluster
from dist_mtp.launch.command import rank_arguments
from dist_mtp.launch.facts import compare_facts, free_port, token_file
from dist_mtp.launch.outcome import STOPPED, Outcome, explain_stop, report, training_began
from dist_mtp.launch.ranks import RANK_MODULE
from dist_mtp.launch.remote import gather_facts
from dist_mtp.launch.torchrun import endpoint
from dist_mtp.launch.warden import Wardens
from dist_mtp.launcher_checks import VARIABLE, check_value
from dist_mtp.monitor.result import read_result
from dist_mtp.run_folder import CONFIG_FILE
from dist_mtp.signals import end_with_parent, handled

HOSTFILE = "launch/hostfile"
"""In the run folder."""
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "LD_LIBRARY", "PATH")
"""Beginnings of variables that DeepSpeed exports to all nodes: ``EXPORT_ENVS`` in launcher/runner.py, and on GPUs the last
three."""
_PLAIN = re.compile(r"[\w@+=:,./-]+")
"""Without ``%``: pdsh puts a host's name in place of ``%h``."""
_SHELLS = {"pdsh": "pdsh", "openmpi": "mpirun"}
_LATE_S = 30.0
"""For the launcher to end after its last rank."""


def check(config: Config, cluster: Cluster, environment: Mapping[str, str]) -> None:
    """Refuse what DeepSpeed would pass to a shell unquoted.

    Raises:
        ConfigError: names the variable or path.
    """
    if not cluster.hosts:
        return
    for path in (os.getcwd(), config.run_dir, config.data.cache_dir, config.launcher.ssh_config, sys.executable):
        if path is not None and not _PLAIN.fullmatch(path):
            raise ConfigError(
                f"launcher=deepspeed passes paths through shells, but {path!r} has blanks or special characters: choose another "
                "path, or launcher=torchrun"
            )
    for name, value in environment.items():
        if name.startswith(_EXPORTED):
            if not VARIABLE.fullmatch(name):
                raise ConfigError(
                    f"environment variable {name!r} has a name that a shell on the nodes could run: unset it"
                )
            _check_exported(name, value)
    for folder in {Path.home(), Path.cwd()}:
        _check_environment_file(folder / environment.get("DS_ENV_FILE", ".deepspeed_env"))
    tool = _SHELLS[config.launcher.remote_shell]
    if shutil.which(tool) is None:
        raise ConfigError(
            f"launcher.remote_shell={config.launcher.remote_shell} needs {tool}, which is not installed on this machine: install "
            "it, or use launcher=torchrun, which needs only ssh"
        )


def check_hosts(config: Config, cluster: Cluster) -> None:
    """Ask every host whether it is there and like the others, and the first one whether the port is free where the ranks
    will meet.

    Raises:
        ConfigError: names the hosts, both values and the fix.
    """
    if not cluster.hosts:
        return
    host, port = endpoint(config, cluster)
    facts = gather_facts(cluster.hosts, config.launcher.ssh_config, port=port)
    if problems := compare_facts(facts):
        raise ConfigError("; ".join(problems))
    if facts[cluster.hosts[0]]["port_free"] is False:
        # DeepSpeed would start all ranks, and those on the other nodes would wait for an answer from who has the port.
        raise ConfigError(
            f"port {port} of {cluster.hosts[0]}, where the ranks shall meet, is in use: end the program that has it, or choose "
            f"another with launcher.rendezvous={host}:PORT"
        )


def check_folder(config: Config, cluster: Cluster) -> None:
    """Ask every host whether it sees the run folder, which must exist.

    Raises:
        ConfigError: names the hosts that do not.
    """
    if not cluster.hosts:
        return
    token = secrets.token_hex(16)
    proof = token_file(config.run_dir, token)
    proof.touch()
    try:
        folder = str(Path(config.run_dir).absolute())
        facts = gather_facts(cluster.hosts, config.launcher.ssh_config, folder, token)
    finally:
        proof.unlink()
    if problems := compare_facts(facts):
        raise ConfigError("; ".join(problems))


def command(config: Config, cluster: Cluster, corpus: Path) -> list[str]:
    """DeepSpeed's command line."""
    arguments = rank_arguments(config, _config_file(config), corpus)
    host, port = endpoint(config, cluster)
    start = [sys.executable, "-m", "deepspeed.launcher.runner"]
    module = ["--no_local_rank", "--module", RANK_MODULE, *arguments]
    if not cluster.hosts:
        port = port if config.launcher.rendezvous else free_port()
        # Without a hostfile it reads /job/hostfile; what is no regular file counts as none. On GPUs it counts the devices
        # itself and refuses more ranks than there are.
        where = ["--hostfile", os.devnull, "--num_accelerators", str(cluster.ranks_per_node)]
        return [*start, *where, "--master_port", str(port), *module]
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
        ConfigError: see :func:`check_folder`.
    """
    check_folder(config, cluster)
    hostfile = Path(config.run_dir) / HOSTFILE
    if cluster.hosts:
        hostfile.parent.mkdir(exist_ok=True)
        hostfile.write_text("".join(f"{host} slots={cluster.ranks_per_node}\n" for host in cluster.hosts))
    before = training_began(config)
    # After a signal, ranks finish their step and save: as long as that makes progress, they are not killed.
    patience_s = max(30.0, config.train.hang_timeout_s)
    received: list[int] = []
    with handled(lambda number, frame: received.append(number)):
        wardens = Wardens(cluster.hosts, config.launcher.ssh_config, str(_config_file(config)), patience_s)
        process = subprocess.Popen(
            command(config, cluster, corpus),
            env=_environment(config),
            start_new_session=True,  # an interrupt at the terminal must not reach it
            # With this process gone it must start no more ranks; wardens see to those that it has started.
            preexec_fn=lambda: end_with_parent(signal.SIGKILL),
        )
        code = _wait(process, wardens, received, patience_s + _LATE_S)
        for problem in wardens.end():
            print(f"error: {problem}", file=sys.stderr)
        _kill_group(process)
    outcome = _explain(config, code, received, trained=training_began(config) != before)
    report(config, outcome)
    return outcome.code


def _wait(process: subprocess.Popen[bytes], wardens: Wardens, received: Sequence[int], patience_s: float) -> int:
    """The launcher's exit code; signals go to the ranks while it runs, and after the first it has ``patience_s`` left."""
    passed_on, kill_at = 0, float("inf")
    while process.poll() is None:
        for number in received[passed_on:]:
            wardens.tell(number)
            passed_on += 1
            kill_at = min(kill_at, time.monotonic() + patience_s)
        if time.monotonic() > kill_at:
            _kill_group(process)
        time.sleep(0.1)
    return process.returncode


def _explain(config: Config, code: int, received: Sequence[int], *, trained: bool) -> Outcome:
    """The run's end; what a rank wrote about it says more than the exit code that came through shells and launchers."""
    if received:
        return explain_stop(config, signal.Signals(received[0]), trained=trained)
    result = read_result(config.run_dir)
    if code in STOPPED:  # somebody else has signalled the ranks
        stopped_by = signal.SIGINT if code == EXIT_INTERRUPTED else signal.SIGTERM
        return explain_stop(config, stopped_by, trained=trained)
    if result is None and code in (EXIT_CONFIG, EXIT_DATA, EXIT_DIVERGED, EXIT_RANK_FAILURE):
        return Outcome(code, f"the run ended with exit code {code}")
    if result is None or result["status"] == "interrupted":
        # Ranks stop by themselves when DeepSpeed's process that started them is gone.
        return Outcome(
            EXIT_RANK_FAILURE,
            f"a rank, or DeepSpeed's process that started it, died or hung: DeepSpeed's launcher ended with exit code {code}",
        )
    return Outcome(int(result["exit_code"]), "")


def _config_file(config: Config) -> Path:
    """By its absolute path wardens know the run's processes."""
    return Path(config.run_dir).absolute() / CONFIG_FILE


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """The launcher and what it has started on this machine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(config: Config) -> dict[str, str]:
    environment = dict(os.environ)
    if config.device == "cpu":
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
        if not VARIABLE.fullmatch(name.strip()):
            raise ConfigError(
                f"{file}, line {number}: {line!r} is not NAME=VALUE: correct it, or use launcher.environment"
            )
        _check_exported(f"{name} in {file}", value)


def _check_exported(name: str, value: str) -> None:
    check_value(name, value)
    if "%" in value:
        raise ConfigError(
            f"environment variable {name}={value!r} holds %, for which pdsh puts in other text: write it out"
        )
