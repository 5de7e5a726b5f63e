"""Command lines on other machines: every word arrives as it was written, and what goes wrong there is told by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_mtp.errors import ConfigError
from dist_mtp.launch.facts import compare_facts
from dist_mtp.launch.remote import gather_facts, ssh_command


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As sshd does, it hands the last argument to a shell; ``gone`` is a host that does not answer."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(
        '#!/bin/bash\nhost="${@: -2:1}"; line="${@: -1}"\n'
        'if [[ $host == gone ]]; then echo "ssh: connect to host gone port 22: No route to host" >&2; exit 255; fi\n'
        'if [[ $host == bare ]]; then echo "No module named dist_mtp" >&2; exit 1; fi\n'
        'exec sh -c "$line"\n'
    )
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


class TestQuoting:
    """A shell on the other machine reads the line; nothing in a path or value may become a command there."""

    @pytest.mark.parametrize(
        "word", ["a b", "$(touch broken)", "`touch broken`", "'; touch broken; '", "a\nb", "*", "", "-n"]
    )
    def test_words_survive_the_shell(
        self, word: str, fake_ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        odd = tmp_path / "folder with $(touch broken) 'quotes'"
        odd.mkdir()
        monkeypatch.chdir(odd)
        monkeypatch.setenv("PYTHONPATH", "/x y:$(touch broken)")
        show = "import os, sys; print([sys.argv[1], os.getcwd(), os.environ['PYTHONPATH']])"
        command = ssh_command("node0", None, [sys.executable, "-c", show, word])
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.stdout == f"{[word, str(odd), '/x y:$(touch broken)']}\n", done.stderr
        assert not list(tmp_path.rglob("broken"))

    @pytest.mark.parametrize("host", ["-oProxyCommand=touch broken", "$(touch broken)", "a b", "root@node0", "node0\n"])
    def test_no_option_as_host(self, host: str) -> None:
        with pytest.raises(ConfigError, match="is not a host"):
            ssh_command(host, None, ["true"])


class TestFacts:
    """Every host is asked, and all that do not answer are named at once."""

    def test_answers(self, fake_ssh: Path, tmp_path: Path) -> None:
        (tmp_path / ".seen_by_all_nodes_abc").touch()
        facts = gather_facts(["node0", "node1"], None, str(tmp_path), "abc")
        assert list(facts) == ["node0", "node1"]
        assert all(fact["token_visible"] and fact["torch"] for fact in facts.values()), facts
        assert compare_facts(facts) == []

    def test_problems_are_named(self, fake_ssh: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            gather_facts(["node0", "gone", "bare"], None)
        told = str(caught.value)
        assert "gone cannot be reached by ssh (ssh: connect to host gone port 22: No route to host)" in told
        assert f"bare cannot run {sys.executable} -m dist_mtp" in told
        assert "No module named dist_mtp" in told
        assert "node0" not in told

    def test_differences_name_hosts_and_values(self) -> None:
        alike = {"code": "a" * 64, "torch": "2.13.0", "token_visible": True}
        told = compare_facts(
            {"node0": alike, "node1": alike | {"torch": None}, "node2": alike | {"token_visible": False}}
        )
        assert len(told) == 2
        assert told[0].startswith(
            "torch differs between nodes: 2.13.0 on node0, node2; not installed on node1: install"
        )
        assert "the run folder on node0 is not the one on node2" in told[1]
