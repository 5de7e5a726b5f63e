"""Real runs on two ranks: what they leave behind, and that stopping, crashing and resuming change no bit of the result."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import cached_property
from pathlib import Path

import pytest
import torch
import yaml
from support import launches
from support.launches import Ended, Running, overrides

from dist_mtp.checkpoint.load import CheckpointReader
from dist_mtp.cli.main import main
from dist_mtp.config import from_mapping
from dist_mtp.config_checks import DEEPSPEED_KEYS
from dist_mtp.errors import EXIT_CONFIG, EXIT_DIVERGED, EXIT_DONE, EXIT_RANK_FAILURE, EXIT_TERMINATED
from dist_mtp.monitor.metrics import comparable
from dist_mtp.monitor.result import read_result

STEPS = 8
SETTINGS = (f"train.steps={STEPS}", "eval.every=4", "checkpoint.every=2", "checkpoint.keep=3")


class Runs:
    """The launches that the tests below look at; each happens once, when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(self, run: str, *more: str) -> list[str]:
        return overrides(self.folder, run, *SETTINGS, *more)

    def copy(self, ended: Ended, run: str) -> Path:
        """A finished run under another name, to do something to."""
        return Path(shutil.copytree(ended.folder, self.folder / run))

    @cached_property
    def whole(self) -> Ended:
        """Never interrupted."""
        command = self.command("whole", "monitor.tensorboard=true")
        return launches.train(launches.dist_mtp(*command), self.folder / "whole")

    @cached_property
    def by_torchrun(self) -> Ended:
        return launches.train(launches.torchrun(*self.command("by_torchrun")), self.folder / "by_torchrun")

    @cached_property
    def by_deepspeed(self) -> Ended:
        return launches.train(launches.deepspeed(*self.command("by_deepspeed")), self.folder / "by_deepspeed")

    @cached_property
    def with_deepspeed_keys(self) -> Ended:
        """Every DeepSpeed key that is let through, at a value that is not its default."""
        values = {bool: "true", int: "3000", float: "2.0"}
        on_by_default = ("allgather_partitions", "contiguous_gradients", "reduce_scatter")
        keys = [
            f"ds.{key}={'false' if key.endswith(on_by_default) else values[kind]}"
            for key, kind in DEEPSPEED_KEYS.items()
        ]
        return launches.train(launches.dist_mtp(*self.command("with_keys", *keys)), self.folder / "with_keys")

    @cached_property
    def again(self) -> Ended:
        """The finished run, started once more."""
        folder = self.copy(self.whole, "again")
        return launches.train(launches.dist_mtp(*self.command("again")), folder)

    @cached_property
    def stopped(self) -> tuple[Ended, list[str], dict[str, object]]:
        """SIGTERM after step 3, to the launcher and, as Slurm does it, to the ranks; checkpoints and result by then."""
        running = Running(launches.dist_mtp(*self.command("stopped", "checkpoint.every=0")), self.folder / "stopped")
        running.wait_for_step(1)
        pids = running.rank_pids().values()
        running.wait_for_step(3)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        running.process.send_signal(signal.SIGTERM)
        ended = running.end()
        return ended, checkpoints(ended.folder), read_result(ended.folder) or {}

    @cached_property
    def stopped_resumed(self) -> Ended:
        ended, _, _ = self.stopped
        return launches.train(launches.dist_mtp(*self.command("stopped", "checkpoint.every=0")), ended.folder)

    @cached_property
    def killed(self) -> tuple[Ended, list[str], dict[str, object]]:
        """SIGKILL of rank 1 after step 5; checkpoints and result by then."""
        running = Running(launches.dist_mtp(*self.command("killed")), self.folder / "killed")
        running.wait_for_step(1)
        pid = running.rank_pids()[1]
        running.wait_for_step(5)
        os.kill(pid, signal.SIGKILL)
        ended = running.end()
        return ended, checkpoints(ended.folder), read_result(ended.folder) or {}

    @cached_property
    def killed_damaged_resumed(self) -> Ended:
        """The killed run, its newest checkpoint damaged, started with the same command."""
        ended, names, _ = self.killed
        shard = ended.folder / "checkpoints" / names[-1] / "rank_00001.safetensors"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        return launches.train(launches.dist_mtp(*self.command("killed")), ended.folder)

    @cached_property
    def diverged(self) -> Ended:
        """In the folder of a finished run, which ``resume=never`` sets aside."""
        folder = self.copy(self.whole, "diverged")
        hopeless = ("optim.lr=1e30", "optim.warmup_steps=0", "optim.clip_norm=0", "resume=never")
        return launches.train(launches.dist_mtp(*self.command("diverged", *hopeless)), folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoints/*"))


def check_same_metrics(got: Ended, expected: Ended) -> None:
    """All keys of all steps but timings, bit for bit."""
    ours, theirs = [comparable(row) for row in got.rows], [comparable(row) for row in expected.rows]
    assert [row["step"] for row in ours] == [row["step"] for row in theirs], "steps differ"
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other, f"step {mine['step']} of {got.folder}: {mine}, of {expected.folder}: {other}"


def check_same_tensors(got: Ended, expected: Ended) -> None:
    """Parameters, moments and router biases after the last step, bit for bit."""
    name = f"checkpoints/step_{STEPS:08d}"
    ours, theirs = CheckpointReader(got.folder / name), CheckpointReader(expected.folder / name)
    assert set(ours.tensors) == set(theirs.tensors), "the checkpoints hold other tensors"
    assert len(ours.tensors) > 100, f"only {len(ours.tensors)} tensors"
    for key in ours.tensors:
        kind, _, logical = key.partition("/")
        mine, other = ours.read_full(kind, logical), theirs.read_full(kind, logical)
        assert torch.equal(mine, other), f"{key} differs by up to {(mine - other).abs().max()}"


class TestRunFolder:
    """A finished run's folder holds everything that the documentation promises, in agreement with itself."""

    def test_exit_code(self, runs: Runs) -> None:
        assert runs.whole.code == EXIT_DONE, f"exited {runs.whole.code}:\n{runs.whole.output}"

    def test_files(self, runs: Runs) -> None:
        folder = runs.whole.folder
        found = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*"))
        expected = [
            ".lock",
            "checkpoints",
            "config.yaml",
            "expert_loads.jsonl",
            "logs",
            "metrics.jsonl",
            "plan.json",
            "plan.png",
            "result.json",
        ]
        assert found == [*expected, "tensorboard", "timeline.png", "timelines"], f"found {found}"
        assert checkpoints(folder) == [f"step_{step:08d}" for step in (4, 6, 8)], f"found {checkpoints(folder)}"
        logs = sorted(path.name for path in (folder / "logs").iterdir())
        assert logs == ["rank_0.log", "rank_1.log"], f"found {logs}"
        events = [path.name for path in (folder / "tensorboard").iterdir()]
        assert len(events) == 1, f"tensorboard/ holds {events}"

    def test_metrics(self, runs: Runs) -> None:
        rows = runs.whole.rows
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), f"steps {[row['step'] for row in rows]}"
        needed = {"step", "tokens", "loss", "loss_main", "loss_mtp_1", "grad_norm", "lr", "step_time", "tokens_per_s"}
        for row in rows:
            assert needed <= set(row), f"step {row['step']} lacks {needed - set(row)}"
            assert row["tokens"] == row["step"] * 8 * 32, f"step {row['step']} counts {row['tokens']} tokens"
        evaluated = [row["step"] for row in rows if "eval_loss_main" in row]
        assert evaluated == [4, 8], f"evaluated after steps {evaluated}, expected [4, 8]"
        assert rows[-1]["loss"] < rows[0]["loss"], f"loss went from {rows[0]['loss']} to {rows[-1]['loss']}"

    def test_result(self, runs: Runs) -> None:
        result, last = read_result(runs.whole.folder), runs.whole.rows[-1]
        assert result is not None, "no result.json"
        got = (result["status"], result["exit_code"], result["message"], result["objective"])
        expected = ("done", EXIT_DONE, None, last["eval_loss_main"])
        assert got == expected, f"status, code, message and objective are {got}, expected {expected}"
        assert result["metrics"] == last, f"result.json has {result['metrics']}, metrics.jsonl ends with {last}"

    def test_configuration_and_plan(self, runs: Runs) -> None:
        config = from_mapping(yaml.safe_load((runs.whole.folder / "config.yaml").read_text()))
        got = (config.train.steps, config.dp, config.vocab_size, config.run_dir)
        assert got == (STEPS, 1, 257, str(runs.whole.folder)), f"steps, dp, vocabulary and folder are {got}"
        plan = json.loads((runs.whole.folder / "plan.json").read_text())
        assert set(plan) >= {"pp", "dp", "ep", "placement", "schedule", "micro_batches", "stages", "predicted", "bound"}
        units = [unit for stage in plan["stages"] for unit in stage["units"]]
        assert len(units) == config.num_units, f"{units} are not {config.num_units} units"

    def test_logs(self, runs: Runs) -> None:
        assert f"step    {STEPS}/{STEPS}" in runs.whole.log(0), f"rank 0's log is {runs.whole.log(0)!r}"
        assert "Traceback" not in runs.whole.log(1), runs.whole.log(1)


class TestThreeWaysToStart:
    """``dist-mtp``, ``torchrun`` and ``deepspeed`` start the same training."""

    def test_torchrun(self, runs: Runs) -> None:
        assert runs.by_torchrun.code == EXIT_DONE, f"exited {runs.by_torchrun.code}:\n{runs.by_torchrun.output}"
        check_same_metrics(runs.by_torchrun, runs.whole)

    def test_deepspeed(self, runs: Runs) -> None:
        assert runs.by_deepspeed.code == EXIT_DONE, f"exited {runs.by_deepspeed.code}:\n{runs.by_deepspeed.output}"
        check_same_metrics(runs.by_deepspeed, runs.whole)


class TestStop:
    """SIGTERM finishes the step, commits a checkpoint and exits 143; the same command then ends where no stop would."""

    def test_exit_code_and_result(self, runs: Runs) -> None:
        ended, _, result = runs.stopped
        assert ended.code == EXIT_TERMINATED, f"exited {ended.code}, expected {EXIT_TERMINATED}:\n{ended.output}"
        got = (result.get("status"), result.get("exit_code"))
        assert got == ("interrupted", EXIT_TERMINATED), f"result.json says {got}"
        assert "Traceback" not in ended.output, ended.output

    def test_checkpoint_of_the_last_step(self, runs: Runs) -> None:
        ended, names, result = runs.stopped
        metrics = result["metrics"]
        assert isinstance(metrics, dict)
        assert 3 <= metrics["step"] < STEPS, f"stopped after step {metrics['step']}"
        assert names == [f"step_{metrics['step']:08d}"], f"{names} after step {metrics['step']}:\n{ended.output}"

    def test_resumed_run_is_the_same(self, runs: Runs) -> None:
        step = int(runs.stopped[1][0].removeprefix("step_"))
        ended = runs.stopped_resumed
        assert ended.code == EXIT_DONE, f"exited {ended.code}:\n{ended.output}"
        assert f"resumed after step {step}" in ended.output, ended.output
        check_same_metrics(ended, runs.whole)
        check_same_tensors(ended, runs.whole)


class TestDeepSpeedKeys:
    """A key of ``ds.*`` is let through only if it does what it says and leaves training what it is."""

    def test_all_at_once(self, runs: Runs) -> None:
        ended = runs.with_deepspeed_keys
        assert ended.code == EXIT_DONE, f"exited {ended.code}:\n{ended.output}"
        assert "optimizer_step" in ended.output, f"wall_clock_breakdown timed nothing:\n{ended.output}"
        check_same_metrics(ended, runs.whole)


class TestKill:
    """A killed rank ends the run with 5 and is named; the same command falls back to the newest intact checkpoint."""

    def test_exit_code_and_blame(self, runs: Runs) -> None:
        ended, _, result = runs.killed
        assert ended.code == EXIT_RANK_FAILURE, f"exited {ended.code}, expected {EXIT_RANK_FAILURE}:\n{ended.output}"
        assert "error: rank 1 was killed by SIGKILL" in ended.output, ended.output
        assert str(ended.folder / "logs") in ended.output, ended.output
        got = (result.get("status"), result.get("exit_code"), result.get("message"))
        assert got == ("failed", EXIT_RANK_FAILURE, "rank 1 was killed by SIGKILL"), f"result.json says {got}"

    def test_falls_back_loudly_and_ends_the_same(self, runs: Runs) -> None:
        names = list(runs.killed[1])
        assert len(names) >= 2, f"needs two checkpoints to damage one, found {names}"
        newest, older = (int(name.removeprefix("step_")) for name in (names[-1], names[-2]))
        ended = runs.killed_damaged_resumed
        assert ended.code == EXIT_DONE, f"exited {ended.code}:\n{ended.output}"
        for part in (f"damaged checkpoint {ended.folder}/checkpoints/{names[-1]}", "rank_00001.safetensors", "SHA-256"):
            assert part in ended.output, f"{part!r} is missing in:\n{ended.output}"
        assert f"resumed after step {older}" in ended.output, (
            f"did not go back from {newest} to {older}:\n{ended.output}"
        )
        check_same_metrics(ended, runs.whole)
        check_same_tensors(ended, runs.whole)


class TestFinishedRun:
    """A finished run that is started again trains nothing and changes nothing but says so."""

    def test_nothing_to_do(self, runs: Runs) -> None:
        again, whole = runs.again, runs.whole
        assert again.code == EXIT_DONE, f"exited {again.code}:\n{again.output}"
        for part in ("nothing to do", f"step {STEPS} of train.steps={STEPS}"):
            assert part in again.output, f"{part!r} is missing in:\n{again.output}"
        for name in ("metrics.jsonl", "result.json"):
            mine, other = (folder / name for folder in (again.folder, whole.folder))
            assert mine.read_bytes() == other.read_bytes(), f"{name} changed to {mine.read_text()}"
        assert checkpoints(again.folder) == checkpoints(whole.folder), f"found {checkpoints(again.folder)}"

    def test_other_model_is_refused(self, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
        before = (runs.whole.folder / "config.yaml").read_text()
        code = main(["train", *runs.command("whole", "model.hidden_size=64")])
        error = capsys.readouterr().err
        assert code == EXIT_CONFIG, f"exited {code}, expected {EXIT_CONFIG}: {error}"
        assert "model.hidden_size 128 -> 64" in error, error
        assert (runs.whole.folder / "config.yaml").read_text() == before, "config.yaml was changed"


class TestDivergence:
    """A loss that is not finite ends the run with 4 before it reaches parameters on disk."""

    def test_exit_code_and_result(self, runs: Runs) -> None:
        ended = runs.diverged
        assert ended.code == EXIT_DIVERGED, f"exited {ended.code}, expected {EXIT_DIVERGED}:\n{ended.output}"
        result = read_result(ended.folder)
        assert result is not None, "no result.json"
        got = (result["status"], result["exit_code"], result["objective"])
        assert got == ("diverged", EXIT_DIVERGED, None), f"result.json says {got}"
        assert "optim.lr" in result["message"], f"{result['message']!r} names no way out"
        assert result["message"] in ended.output, ended.output

    def test_old_run_was_set_aside(self, runs: Runs) -> None:
        aside = runs.diverged.folder.with_name("diverged.old-1")
        assert read_result(aside) == read_result(runs.whole.folder), f"{aside} does not hold the old run"
        left = sorted(runs.diverged.folder.glob("checkpoints/step_*"))
        assert left == [], f"{left} hold parameters of a diverged run"
