"""Ranks that the doctor starts: what they say when they work, hang or fail, and that none stays."""

from __future__ import annotations

import subprocess
import time

import psutil
import pytest

from dist_mtp.config import LauncherConfig
from dist_mtp.doctor import all_reduce
from dist_mtp.doctor.all_reduce import Outcome, check_all_reduce, check_torch_sees_gpus, try_all_reduce


def test_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that the user exported stays, as in training, and is named when it is wrong."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    outcome = try_all_reduce("gloo", 2, LauncherConfig())
    assert check_all_reduce("gloo", outcome).level == "ok", outcome
    assert outcome.answer["deepspeed"] == "", outcome
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-if")
    broken = check_all_reduce("gloo", try_all_reduce("gloo", 2, LauncherConfig()))
    assert broken.level == "error", broken
    assert "no-such-if" in broken.what, broken


def test_ranks_get_the_network_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback whatever the host's name resolves to, or ``launcher.interface``."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    loopback = next(name for name, found in psutil.net_if_addrs().items() if "127.0.0.1" in [a.address for a in found])
    other = next((name for name in psutil.net_if_addrs() if name != loopback), loopback)
    found = [
        all_reduce._environment(1, 2, launcher)["GLOO_SOCKET_IFNAME"]
        for launcher in (LauncherConfig(), LauncherConfig(interface=other))
    ]
    assert found == [loopback, other], found


def test_one_that_failed_is_not_waited_for() -> None:
    """The others would wait for it."""
    failed, waiting = subprocess.Popen(["false"]), subprocess.Popen(["sleep", "60"])
    try:
        started = time.monotonic()
        assert all_reduce._wait([failed, waiting], started + 30) == (1, None)
        assert time.monotonic() - started < 10
    finally:
        waiting.kill()
        waiting.wait()


def test_one_that_waits_for_ever_is_ended() -> None:
    """The second rank never comes."""
    started = time.monotonic()
    outcome = try_all_reduce("gloo", 2, LauncherConfig(), started=1, timeout_s=0.5)
    assert time.monotonic() - started < 20, "it ended by itself"
    assert outcome.codes == (None,)
    found = check_all_reduce("gloo", outcome)
    assert (found.level, "did not end within" in found.what) == ("error", True), found


def test_wrong_sum_is_an_error() -> None:
    found = check_all_reduce("nccl", Outcome(1.0, (0, 0), {"sum": 2.0, "seconds": 0.1}))
    assert (found.level, "wrong sum" in found.what) == ("error", True), found


def test_gpus_that_torch_sees() -> None:
    assert check_torch_sees_gpus(2, 2, device="cuda") is None
    assert check_torch_sees_gpus(2, None, device="cuda") is None
    levels = [found.level for d in ("auto", "cuda") if (found := check_torch_sees_gpus(2, 0, device=d)) is not None]
    assert levels == ["warning", "error"], levels
