"""``dist-mtp train -m``: every point is a run of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import launches
from support.launches import overrides

from dist_mtp.cli.sweep import _point_name, _run
from dist_mtp.config import from_mapping
from dist_mtp.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RANK_FAILURE, EXIT_TERMINATED
from dist_mtp.monitor.metrics import read_metrics
from dist_mtp.monitor.result import read_result


def sweep(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = [override for override in overrides(folder, "unused") if not override.startswith("run.dir=")]
    command = launches.dist_mtp("-m", *arguments, "run.name=sweep", "train.steps=2", *more)
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * launches.TIMEOUT_S, cwd=folder)


class TestPoints:
    """Each combination of values trains in its own folder, which is named after what was swept."""

    def test_two_points(self, tmp_path: Path) -> None:
        done = sweep(tmp_path, "mtp.depth=0,1", "launcher=none", "parallel.pp=1")
        assert done.returncode == EXIT_DONE, f"exited {done.returncode}:\n{done.stdout}{done.stderr}"
        folder = tmp_path / "sweeps" / "sweep"
        found = sorted(path.name for path in folder.iterdir())
        assert found == ["mtp.depth=0", "mtp.depth=1"], f"found {found}"
        for depth in (0, 1):
            point = folder / f"mtp.depth={depth}"
            config = from_mapping(yaml.safe_load((point / "config.yaml").read_text()))
            assert (config.mtp.depth, config.train.steps) == (depth, 2), f"{point} trained {config.mtp}, {config.train}"
            result, last = read_result(point), read_metrics(point / "metrics.jsonl")[-1]
            assert result is not None, f"{point} has no result.json"
            got, expected = (result["status"], result["objective"]), ("done", last["eval_loss_main"])
            assert got == expected, f"{point}: status and objective are {got}, expected {expected}"
            assert ("loss_mtp_1" in last) == (depth == 1), f"{point} measured {sorted(last)}"

    def test_bad_points_are_all_reported(self, tmp_path: Path) -> None:
        done = sweep(tmp_path, "mtp.depth=-1,-2")
        assert done.returncode == EXIT_CONFIG, f"exited {done.returncode}, expected {EXIT_CONFIG}:\n{done.stderr}"
        for depth in (-1, -2):
            assert f"error: mtp.depth={depth}" in done.stderr, f"point {depth} is not reported:\n{done.stderr}"
        assert not (tmp_path / "sweeps" / "sweep").exists(), "a refused point left a folder"

    def test_what_hydra_refuses(self, tmp_path: Path) -> None:
        done = sweep(tmp_path, "optim.lr=[1,")
        assert done.returncode == EXIT_CONFIG, f"exited {done.returncode}, expected {EXIT_CONFIG}:\n{done.stderr}"


class TestSignal:
    """A signal ends the whole sweep, also when the point under way could not save and so ends with another code."""

    @pytest.mark.parametrize(("point_code", "code"), [(EXIT_RANK_FAILURE, EXIT_RANK_FAILURE), (0, EXIT_TERMINATED)])
    def test_no_further_points(self, tmp_path: Path, point_code: int, code: int) -> None:
        script = (
            "import signal\n"
            "from dist_mtp.cli import sweep\n"
            "ran = []\n"
            "def run(command, signals):\n"
            "    ran.append(command)\n"
            "    signals.append(signal.SIGTERM)\n"
            f"    return {point_code}\n"
            "sweep._run = run\n"
            "print(sweep.sweep(['mtp.depth=0,1,2']), len(ran))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.stdout.split() == [str(code), "1"], f"code and points: {done.stdout}\n{done.stderr}"

    def test_is_noticed_and_passed_on(self) -> None:
        kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        signals: list[int] = []
        try:
            code = _run(["sh", "-c", "sleep 1; kill -TERM $PPID; sleep 30"], signals)
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
        assert (code, signals) == (-signal.SIGTERM, [signal.SIGTERM]), f"exited {code}, noticed {signals}"


class TestPointNames:
    """A point's folder is one folder with a readable name, whatever the values hold."""

    @pytest.mark.parametrize(
        ("swept", "name"),
        [
            (["mtp.depth=0"], "mtp.depth=0"),
            (["mtp.depth=0", "train.seed=1"], "mtp.depth=0,train.seed=1"),
            (["data.path=../../etc"], "data.path=.._.._etc"),
            (["pipeline.layout='3,2,2,3'"], "pipeline.layout=_3,2,2,3_"),
            ([], "7"),
            (["run.name=" + "x" * 300], "7"),
        ],
        ids=str,
    )
    def test_name(self, swept: list[str], name: str) -> None:
        given = ["train.steps=2", "monitor.tensorboard=false", "optim.lr=1e-3", "run.name='a b'", "mtp.depth=0,1"]
        shared = ["train.steps=2", "monitor.tensorboard=False", "optim.lr=0.001", "run.name='a b'"]
        got = _point_name(given, [*shared, *swept], 7)
        assert got == name, f"{swept} is called {got!r}, expected {name!r}"
