"""What a check found, and how findings are shown."""

from __future__ import annotations

import os
import shutil
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]
"""``note``: nothing to fix, but good to know. ``error``: training would fail."""

_COMMAND_TIMEOUT_S = 10.0
_WIDTH = 120


@dataclass(frozen=True)
class Finding:
    name: str
    """What was checked."""
    level: Level
    what: str
    """Was found."""
    fix: str = ""
    """What to do; empty where there is nothing to do."""


def table(findings: Sequence[Finding]) -> list[str]:
    """Findings in columns, long texts wrapped, each fix on a line of its own; the last line counts problems."""
    names = max((len(finding.name) for finding in findings), default=0)
    indent = " " * (names + 11)  # the longest level has 7 letters, and columns are 2 apart
    lines = []
    for finding in findings:
        start = f"{finding.name:<{names}}  {finding.level:<7}  "
        lines += textwrap.wrap(start + finding.what, _WIDTH, subsequent_indent=indent, break_on_hyphens=False)
        if finding.fix:
            fix = f"{indent}fix: {finding.fix}"
            lines += textwrap.wrap(fix, _WIDTH, subsequent_indent=indent + "     ", break_on_hyphens=False)
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    return [
        *lines,
        "",
        f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}",
    ]


def split_fix(message: str) -> tuple[str, str]:
    """What an error message says is wrong, and the fix, which stands after its last colon."""
    what, _, fix = message.rpartition(": ")
    return (what, fix) if what else (fix, "")


def completed(
    command: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A program that has ended, in whatever way, and could ask nobody anything.

    Raises:
        OSError: it cannot be run.
        subprocess.TimeoutExpired: it did not end, and was killed.
    """
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        env=env,
    )


def output_of(*command: str, timeout_s: float = _COMMAND_TIMEOUT_S) -> str | None:
    """Standard output of a program; None if it is not installed, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = completed(command, timeout_s, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
