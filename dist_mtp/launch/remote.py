"""Processes on other machines, by ssh."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dist_mtp.errors import ConfigError
from dist_mtp.launcher_checks import check_host

CONNECT_S = 10
"""A host that does not answer for this long is not there."""
UNREACHED = 255
"""ssh's own exit code."""


def ssh_command(host: str, config_file: str | None, argv: Sequence[str]) -> list[str]:
    """Run ``argv`` on ``host``, in this process's working folder and with its ``PYTHONPATH``.

    Raises:
        ConfigError: ``host`` is none.
    """
    check_host(host, "launcher.hosts")
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}"]
    # A connection whose other end is gone ends after these 15 s instead of never.
    options += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
    if config_file is not None:
        options = ["-F", config_file, *options]
    return ["ssh", *options, "--", host, remote_line(argv)]


def remote_line(argv: Sequence[str]) -> str:
    """One line for the other machine's shell, every word quoted."""
    environment = [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if os.environ.get("PYTHONPATH") else []
    words = ["env", *environment, *argv] if environment else list(argv)
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"


def gather_facts(
    hosts: Sequence[str],
    config_file: str | None,
    run_dir: str | None = None,
    token: str | None = None,
    port: int | None = None,
) -> dict[str, dict[str, Any]]:
    """What :func:`~dist_mtp.launch.facts.node_facts` says on each host, asked at the same time.

    Args:
        port: that is wanted on the first host.

    Raises:
        ConfigError: names every host that was not reached or could not answer, with what ssh said.
    """
    argv = [sys.executable, "-m", "dist_mtp.launch.facts"]
    argv += ["--run-dir", run_dir] if run_dir is not None else []
    argv += ["--token", token] if token is not None else []

    def ask(host: str) -> dict[str, Any] | str:
        wanted = ["--port", str(port)] if port is not None and host == hosts[0] else []
        command = ssh_command(host, config_file, [*argv, *wanted])
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * CONNECT_S
            )
        except subprocess.TimeoutExpired:
            return f"{host} did not answer within {2 * CONNECT_S} s"
        if done.returncode != 0:
            return explain_ssh(host, done.returncode, done.stderr)
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return facts

    with ThreadPoolExecutor(max_workers=64) as pool:
        answers = dict(zip(hosts, pool.map(ask, hosts), strict=True))
    if problems := [answer for answer in answers.values() if isinstance(answer, str)]:
        raise ConfigError("; ".join(problems))
    return {host: answer for host, answer in answers.items() if not isinstance(answer, str)}


def explain_ssh(host: str, code: int, said: str) -> str:
    """Why a command on ``host`` could not be run."""
    lines = [line.strip() for line in said.strip().splitlines() if line.strip()]
    reason = lines[-1] if lines else f"exit code {code}"
    if code == UNREACHED:
        return f"{host} cannot be reached by ssh ({reason}): check the name, and that `ssh {host} true` works without a password"
    return f"{host} cannot run {sys.executable} -m dist_mtp in {os.getcwd()} ({reason}): all nodes need the same installation"
