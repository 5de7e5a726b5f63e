"""One command for all hosts: what it makes of how each host's launcher ended. Here each is a line of shell."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from dist_mtp.cli.compose import compose
from dist_mtp.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_RANK_FAILURE, EXIT_TERMINATED
from dist_mtp.launch import torchrun
from dist_mtp.launch.agent import BEGAN
from dist_mtp.launch.cluster import Cluster

HOSTS = ("node0", "node1")
MET = f"echo '{BEGAN}' >&2"
UNKNOWN = "echo 'ssh: Could not resolve hostname node0: Name or service not known' >&2"


@pytest.mark.parametrize(
    ("first", "second", "code", "words"),
    [
        ("exit 0", f"{MET}; exit 0", 0, ""),
        ("sleep 0.5; exit 143", f"{MET}; sleep 0.5; exit 143", EXIT_TERMINATED, ""),
        (
            "sleep 0.5; exit 255",
            f"{MET}; sleep 1; exit 143",
            EXIT_RANK_FAILURE,
            "connection to node0 was lost after the run",
        ),
        ("exit 255", "cat > /dev/null; exit 143", EXIT_CONFIG, "node0 cannot be reached by ssh"),
        ("cat > /dev/null; exit 143", f"{UNKNOWN}; exit 255", EXIT_CONFIG, "node1 cannot be reached by ssh"),
        ("exit 2", "echo 'error: torch differs' >&2; exit 2", EXIT_CONFIG, "node1: error: torch differs"),
        (f"{MET}; exit 255", None, EXIT_RANK_FAILURE, "connection to node0 was lost after the run"),
        ("echo 'ssh: no route' >&2; exit 255", None, EXIT_CONFIG, "ssh: no route"),
    ],
    ids=["done", "stopped", "lost", "first unknown", "second unknown", "refused", "only one lost", "only one unknown"],
)
def test_exit_code(
    first: str,
    second: str | None,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bad configuration only if the run never began: scripts that start runs again take it for final."""
    got, said = run([first] if second is None else [first, second], monkeypatch, capsys)
    assert got == code, f"exited {got}, expected {code}: {said}"
    assert words in said, said
    assert BEGAN not in said, "a word between launchers was shown"


def test_an_early_signal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Launchers that are just starting die of it; ssh says 255 for that."""
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    got, said = run(["head -n 2 > /dev/null; kill -INT $$", "head -n 2 > /dev/null; exit 255"], monkeypatch, capsys)
    timer.join()
    assert got == EXIT_INTERRUPTED, f"exited {got}: {said}"
    assert "cannot be reached" not in said, said


def run(lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of a launch whose hosts run these lines."""
    monkeypatch.setattr(torchrun, "node_commands", lambda *_: [["sh", "-c", line] for line in lines])
    hosts = HOSTS[: len(lines)]
    config = compose(["launcher=torchrun", f"launcher.hosts=[{','.join(hosts)}]", "launcher.ranks_per_node=1"])
    code = torchrun.run(config, Cluster(hosts, len(hosts), 1, is_elsewhere=True))
    return code, capsys.readouterr().err
