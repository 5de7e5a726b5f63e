"""Answers of other hosts: late, garbled, wrong or none at all, each becomes a finding of that host."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dist_mtp.doctor.hosts import OWN_FINDINGS, Answer, AskedFacts, check_skew, host_findings
from dist_mtp.errors import ConfigError
from dist_mtp.launch.facts import node_facts


@pytest.mark.parametrize(
    ("ahead", "half", "level"),
    [(0.9, 0.0, "ok"), (1.1, 0.0, "warning"), (-1.1, 0.0, "warning"), (1.9, 1.0, "ok"), (2.1, 1.0, "warning")],
)
def test_skew(ahead: float, half: float, level: str) -> None:
    """More than a second beyond what the question itself took."""
    found = check_skew("a", AskedFacts({"time": 100.0 + ahead}, 100.0 - half, 100.0 + half))
    assert found.level == level, found
    assert f"{abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} this machine's" in found.what, found


class TestAnswers:
    def found(self, folder: Path, facts: Answer, findings: Answer) -> dict[str, str]:
        """Names, levels and texts for a host ``b`` that answers so."""

        def ask(host: str, argv: Sequence[str], timeout_s: float) -> Answer:
            return findings if OWN_FINDINGS in argv else facts

        return {f.name: f"{f.level} {f.what}" for f in host_findings(["b"], None, folder, [], ask)}

    def facts(self, **changes: Any) -> str:
        return json.dumps({**node_facts(), "time": time.time(), "token_visible": True, **changes})

    def test_good(self, tmp_path: Path) -> None:
        good = json.dumps([{"name": "CPU", "level": "note", "what": "slow", "fix": ""}])
        found = self.found(tmp_path, f"welcome\n{self.facts()}\n", good)
        assert {text.split()[0] for text in found.values()} == {"ok"}, found
        assert list(tmp_path.iterdir()) == [], "the file that hosts looked for is still there"

    def test_bad_findings(self, tmp_path: Path) -> None:
        bad = json.dumps([{"name": "CPU", "level": "error", "what": "none", "fix": "buy one"}])
        found = self.found(tmp_path, self.facts(token_visible=False), bad)
        assert found["b: CPU"] == "error none", found
        assert "run folder" in found["hosts alike"], found

    @pytest.mark.parametrize("answer", ["", "hello", "5", "[1]", '{"time": "noon"}', '{"host": "b"}'])
    def test_garbled(self, answer: str, tmp_path: Path) -> None:
        assert "did not answer with its facts" in self.found(tmp_path, answer, "[]")["b"]
        assert self.found(tmp_path, self.facts(), answer)["b"].startswith("error dist-mtp doctor said")

    def test_unreached(self, tmp_path: Path) -> None:
        found = self.found(tmp_path, ConfigError("b cannot be reached by ssh (timed out): check the name"), "[]")
        assert found == {"b": "error b cannot be reached by ssh (timed out)"}, found
