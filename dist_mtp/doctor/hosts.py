"""The other hosts of a run, asked by ssh: their own findings, and what differs from this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_mtp.doctor.finding import Finding, completed, split_fix
from dist_mtp.errors import ConfigError
from dist_mtp.launch.facts import compare_facts, node_facts, token_file
from dist_mtp.launch.remote import explain_ssh, ssh_command

OWN_FINDINGS = "--findings"
"""Makes ``dist-mtp doctor`` print findings of its machine as JSON."""
_FACTS_TIMEOUT_S = 30.0
_DOCTOR_TIMEOUT_S = 180.0
_SKEW_S = 1.0
_AT_A_TIME = 16

Answer = str | ConfigError
"""Standard output of a remote command, or why there is none."""
Ask = Callable[[str, Sequence[str], float], Answer]
"""Runs a command on a host, for at most so many seconds."""


@dataclass(frozen=True)
class AskedFacts:
    """A host's facts, and when this machine asked and had the answer (seconds since 1970, by its own clock)."""

    facts: Mapping[str, Any]
    asked: float
    answered: float


def check_skew(host: str, asked: AskedFacts) -> Finding:
    """The host's clock, which it read between question and answer, against the middle of these two."""
    half = (asked.answered - asked.asked) / 2
    ahead = float(asked.facts["time"]) - (asked.asked + half)
    what = f"{abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} this machine's, known to {half:.2f} s"
    if abs(ahead) > half + _SKEW_S:
        return Finding(f"{host}: clock", "warning", what, "start chrony or systemd-timesyncd on both")
    return Finding(f"{host}: clock", "ok", what)


def check_alike(this_host: str, own: Mapping[str, Any], others: Mapping[str, AskedFacts]) -> list[Finding]:
    """Versions, code and the run folder's file system."""
    facts = {f"{this_host} (here)": own, **{host: asked.facts for host, asked in others.items()}}
    problems = compare_facts(facts)
    if not problems and others:
        return [Finding("hosts alike", "ok", f"{len(facts)} hosts have the same versions, code and run folder")]
    return [Finding("hosts alike", "error", *split_fix(problem)) for problem in problems]


def host_findings(
    hosts: Sequence[str],
    ssh_config: str | None,
    folder: Path,
    overrides: Sequence[str],
    ask: Ask | None = None,
    try_way: Callable[[Sequence[str]], list[Finding]] = lambda reached: [],
) -> list[Finding]:
    """What is wrong on the other hosts; what is right there is counted only.

    Args:
        folder: existing one in which a file is written that all hosts must see.
        overrides: of this command, given on to the same command there.
        ask: by ssh, unless something else is given.
        try_way: of the hosts that ssh reaches, from one to another; called last, as it takes a port that hosts look at.
    """
    ask = ask or (lambda host, argv, timeout_s: _ask(host, ssh_config, argv, timeout_s))
    token = secrets.token_hex(8)
    seen = token_file(folder, token)
    own = node_facts()
    with ThreadPoolExecutor(max_workers=_AT_A_TIME) as pool:
        try:
            with contextlib.suppress(OSError):  # a folder that cannot be written is a finding of its own
                seen.touch()
            look = seen.exists()
            answers = dict(
                zip(
                    hosts, pool.map(lambda host: _facts(host, folder, token if look else None, ask), hosts), strict=True
                )
            )
        finally:
            seen.unlink(missing_ok=True)
        reached = {host: answer for host, answer in answers.items() if isinstance(answer, AskedFacts)}
        own_findings = pool.map(lambda host: _own_findings(host, overrides, ask), reached)
        found = [
            Finding(host, "error", *split_fix(str(answer)))
            for host, answer in answers.items()
            if isinstance(answer, ConfigError)
        ]
        found += check_alike(str(own["host"]), own, reached)
        found += [check_skew(host, asked) for host, asked in reached.items()]
        for findings in own_findings:
            found += findings
    return [*found, *try_way(list(reached))]


def _facts(host: str, folder: Path, token: str | None, ask: Ask) -> AskedFacts | ConfigError:
    argv = [sys.executable, "-m", "dist_mtp.launch.facts"]
    if token is not None:
        argv += ["--run-dir", str(folder), "--token", token]
    asked = time.time()
    answer = ask(host, argv, _FACTS_TIMEOUT_S)
    answered = time.time()
    if isinstance(answer, ConfigError):
        return answer
    facts = _last_line(answer)
    if not isinstance(facts, dict) or not isinstance(facts.get("time"), float):
        return ConfigError(
            f"{host} did not answer with its facts but {answer[-200:]!r}: see what its shell prints at login"
        )
    return AskedFacts(facts, asked, answered)


def _own_findings(host: str, overrides: Sequence[str], ask: Ask) -> list[Finding]:
    """Those of ``dist-mtp doctor`` on the host that are not ok, or one that counts."""
    answer = ask(host, [sys.executable, "-m", "dist_mtp", "doctor", OWN_FINDINGS, *overrides], _DOCTOR_TIMEOUT_S)
    if isinstance(answer, ConfigError):
        return [Finding(host, "error", *split_fix(str(answer)))]
    try:
        findings = [Finding(**values) for values in _last_line(answer)]
    except TypeError:
        return [Finding(host, "error", f"dist-mtp doctor said {answer[-200:]!r}", "run it there by hand")]
    wrong = [finding for finding in findings if finding.level in ("warning", "error")]
    if not wrong:
        return [Finding(host, "ok", f"{len(findings)} checks there found nothing to fix")]
    return [dataclasses.replace(finding, name=f"{host}: {finding.name}") for finding in wrong]


def _last_line(answer: str) -> Any:
    """The JSON in it; None if it is something else."""
    try:
        return json.loads(answer.splitlines()[-1])
    except (ValueError, IndexError):
        return None


def _ask(host: str, ssh_config: str | None, argv: Sequence[str], timeout_s: float) -> Answer:
    try:
        done = completed(ssh_command(host, ssh_config, argv), timeout_s)
    except subprocess.TimeoutExpired:
        return ConfigError(f"{host} did not answer within {timeout_s:.0f} s: see what it is busy with")
    except OSError as error:
        return ConfigError(f"ssh cannot be run ({error}): install openssh-client")
    return done.stdout if done.returncode == 0 else ConfigError(explain_ssh(host, done.returncode, done.stderr))
