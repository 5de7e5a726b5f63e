"""What must be alike on all nodes of a run, as one line of JSON: ``python -m dist_mtp.launch.facts``.

Importing torch would take seconds on every node, so versions come from the installed packages' metadata.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import socket
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dist_mtp import __version__

Fact = str | float | int | bool | None

_PACKAGE = Path(__file__).resolve().parents[1]
_TOKEN = re.compile(r"[A-Za-z0-9]{1,64}")
_SAME_PACKAGES = "install the same version on all nodes, such as with pip install -r constraints.txt"
_FIXES = {
    "dist_mtp": "install the same version on all nodes",
    "code": "install the same files on all nodes, or keep them in a folder that all of them mount",
    "python": "use the same virtual environment, or the same minor version, on all nodes",
    "torch": _SAME_PACKAGES,
    "deepspeed": _SAME_PACKAGES,
    "numpy": _SAME_PACKAGES,  # its generators decide the order of the data
}
"""Facts that must be equal, and what to do where they are not."""
_NAMES = {"dist_mtp": "version of dist_mtp", "code": "dist_mtp's own code (SHA-256)"}
_SHOWN_DIGITS = 12


def node_facts(run_dir: str | None = None, token: str | None = None, port: int | None = None) -> dict[str, Fact]:
    """Facts of this node.

    Args:
        run_dir: folder in which another node has written :func:`token_file`.
        token: letters and digits that no other run uses.
        port: that is wanted on this node.

    Returns:
        ``host``, ``time`` (seconds since 1970), ``python`` (major and minor), ``dist_mtp``, ``code``, versions of packages
        (None: not installed), ``token_visible`` (None: there was no token to look for) and ``port_free`` (None: no port is
        wanted).
    """
    visible = None if run_dir is None or token is None else token_file(run_dir, token).is_file()
    return {
        "host": socket.gethostname(),
        "dist_mtp": __version__,
        "code": code_digest(_PACKAGE),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": installed_version("torch"),
        "deepspeed": installed_version("deepspeed"),
        "numpy": installed_version("numpy"),
        "token_visible": visible,
        "port_free": None if port is None else is_free(port),
        "time": time.time(),  # last: nothing slow stands between it and the answer
    }


def compare_facts(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What differs between nodes, each as a message that names hosts, values and the fix; empty when all are alike.

    Args:
        facts: of :func:`node_facts`, by host; the first one is the one whose folder all must see. What a node leaves out
            counts as not installed. Clocks are not compared: the nodes did not look at them at one time.
    """
    problems = []
    for fact, fix in _FIXES.items():
        hosts_by_value: dict[str, list[str]] = {}
        for host, known in facts.items():
            hosts_by_value.setdefault(_shown(known.get(fact)), []).append(host)
        if len(hosts_by_value) > 1:
            values = "; ".join(f"{value} on {_listed(hosts)}" for value, hosts in hosts_by_value.items())
            problems.append(f"{_NAMES.get(fact, fact)} differs between nodes: {values}: {fix}")
    blind = [host for host, known in facts.items() if known.get("token_visible") is False]
    if blind:
        problems.append(
            f"the run folder on {next(iter(facts))} is not the one on {_listed(blind)}, where a file written there does not "
            "appear: set run.dir to a folder on a file system that all nodes share"
        )
    return problems


def token_file(run_dir: str | Path, token: str) -> Path:
    """The empty file by which nodes see that they share a folder.

    Raises:
        ValueError: the token is no word of letters and digits.
    """
    if not _TOKEN.fullmatch(token):
        raise ValueError(f"{token!r} is not a token: up to 64 letters and digits")
    return Path(run_dir) / f".seen_by_all_nodes_{token}"


def code_digest(package: Path) -> str:
    """SHA-256 over names and contents of the package's ``*.py`` files.

    ``conf/`` is left out: only a wheel has it inside the package, and the composed configurations are compared anyway.
    """
    digest = hashlib.sha256()
    files = {file.relative_to(package): file for file in package.rglob("*.py")}
    for name in sorted(files, key=Path.as_posix):
        if name.parts[0] != "conf":
            content = files[name].read_bytes()
            digest.update(f"{name.as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def is_free(port: int) -> bool:
    """Whether a program could listen on ``port`` of this machine now."""
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    """A port of this machine that no program listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def installed_version(package: str) -> str | None:
    """Version of an installed package, which is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: list[str] | None = None) -> int:
    """``python -m dist_mtp.launch.facts [--run-dir FOLDER --token TOKEN] [--port PORT]``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir")
    parser.add_argument("--token")
    parser.add_argument("--port", type=int)
    parsed = parser.parse_args(arguments)
    print(json.dumps(node_facts(parsed.run_dir, parsed.token, parsed.port)))
    return 0


def _shown(value: object) -> str:
    text = "not installed" if value is None else str(value)
    return text[:_SHOWN_DIGITS] if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _listed(hosts: list[str]) -> str:
    """A few hosts by name, the others by number."""
    return ", ".join(hosts) if len(hosts) <= 4 else f"{', '.join(hosts[:3])} and {len(hosts) - 3} others"


if __name__ == "__main__":
    sys.exit(main())
