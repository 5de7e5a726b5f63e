"""From what became of the ranks to one exit code, and from signals to one orderly stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_mtp import train
from dist_mtp.config import Config, from_mapping
from dist_mtp.errors import (
    EXIT_DATA,
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_RANK_FAILURE,
    EXIT_TERMINATED,
)
from dist_mtp.launch.local import launch
from dist_mtp.launch.outcome import explain_failure, first_failure, report
from dist_mtp.monitor.result import read_result, write_result

KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM


def failures(*ends: tuple[int, int]) -> dict[int, SimpleNamespace]:
    """One ``(exit code, time stamp)`` per rank, as torchrun reports them."""
    return {
        rank: SimpleNamespace(
            exitcode=code, timestamp=time, signal_name=lambda code=code: signal.Signals(-code).name if code < 0 else ""
        )
        for rank, (code, time) in enumerate(ends)
    }


def end(config: Config, *ends: tuple[int, int]) -> int:
    """Exit code of the launcher, after it has told how the ranks ended."""
    outcome = explain_failure(config, failures(*ends))
    report(config, outcome)
    return outcome.code


class TestBlame:
    """The rank that failed first is blamed, and among those of one second the one whose end says most."""

    @pytest.mark.parametrize(
        ("ends", "rank"),
        [
            ([(5, 100), (KILLED, 100)], 1),
            ([(5, 100), (KILLED, 101)], 1),
            ([(KILLED, 100), (5, 100)], 0),
            ([(5, 100), (KILLED, 130)], 0),
            ([(5, 100), (3, 100)], 1),
            ([(3, 100), (KILLED, 100)], 0),
            ([(TERMINATED, 100), (5, 100)], 1),
            ([(1, 100), (TERMINATED, 100), (-signal.SIGSEGV, 100)], 2),
            ([(4, 100), (4, 100)], 0),
            ([(5, 103), (5, 100)], 1),
        ],
        ids=str,
    )
    def test_first_failure(self, ends: list[tuple[int, int]], rank: int) -> None:
        got, failure = first_failure(failures(*ends))
        assert got == rank, f"blamed rank {got} for {ends}, expected rank {rank}"
        assert failure.exitcode == ends[rank][0], f"reports exit code {failure.exitcode} of another rank"

    @pytest.mark.parametrize(
        ("ends", "code", "message"),
        [
            ([(5, 100), (KILLED, 100)], EXIT_RANK_FAILURE, "rank 1 was killed by SIGKILL"),
            ([(1, 100), (TERMINATED, 100)], EXIT_RANK_FAILURE, "rank 0 failed or stopped making progress"),
            ([(137, 100)], EXIT_RANK_FAILURE, "rank 0 failed or stopped making progress"),
            ([(5, 100), (3, 100)], EXIT_DATA, "rank 1 ended with exit code 3"),
            (
                [(5, 100), (KILLED, 130)],
                EXIT_RANK_FAILURE,
                "rank 0 failed or stopped making progress; rank 1 did not react to SIGTERM and was killed: it may be "
                "the one that hung",
            ),
        ],
        ids=str,
    )
    def test_explanation(
        self,
        ends: list[tuple[int, int]],
        code: int,
        message: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        config = from_mapping({"run": {"dir": str(tmp_path)}})
        got = end(config, *ends)
        error = capsys.readouterr().err
        assert got == code, f"exit code {got}, expected {code}"
        assert f"error: {message}\n" in error, f"{error!r} lacks {message!r}"
        assert str(tmp_path / "logs") in error, f"{error!r} does not say where the logs are"
        result = read_result(tmp_path)
        assert result is not None, "no result.json"
        left = (result["status"], result["exit_code"], result["message"])
        assert left == ("failed", code, message), f"result.json says {left}"

    def test_result_of_a_rank_is_kept(self, tmp_path: Path) -> None:
        """The rank knows more than the launcher: it wrote which step diverged."""
        write_result(tmp_path, "diverged", EXIT_DIVERGED, {}, None, "step 3: loss nan")
        config = from_mapping({"run": {"dir": str(tmp_path)}})
        code = end(config, (4, 100), (4, 100))
        result = read_result(tmp_path)
        assert code == EXIT_DIVERGED, f"exit code {code}, expected {EXIT_DIVERGED}"
        assert result is not None, "result.json vanished"
        assert result["message"] == "step 3: loss nan", f"result.json says {result['message']!r}"

    def test_ranks_that_were_told_to_stop(self, tmp_path: Path) -> None:
        write_result(tmp_path, "interrupted", EXIT_TERMINATED, {}, None, None)
        config = from_mapping({"run": {"dir": str(tmp_path)}})
        code = end(config, (143, 100), (143, 100))
        assert code == EXIT_TERMINATED, f"exit code {code}, expected {EXIT_TERMINATED}"

    def test_rank_that_stopped_without_a_checkpoint(self, tmp_path: Path) -> None:
        """Rank 1 ended as told, rank 0 died before it could say that the checkpoint is there."""
        config = from_mapping({"run": {"dir": str(tmp_path)}})
        code = end(config, (KILLED, 100), (143, 100))
        result = read_result(tmp_path)
        assert code == EXIT_RANK_FAILURE, f"exit code {code}, expected {EXIT_RANK_FAILURE}"
        assert result is not None, "no result.json"
        assert result["status"] == "failed", f"result.json says {result}"


class TestStop:
    """After a signal 130 and 143 mean that nothing was lost. Otherwise a run would look safe whose last steps are gone."""

    @pytest.mark.parametrize(
        ("number", "wrote", "trained", "code", "status"),
        [
            (signal.SIGTERM, "interrupted", True, EXIT_TERMINATED, "interrupted"),
            (signal.SIGINT, "interrupted", True, EXIT_INTERRUPTED, "interrupted"),
            (signal.SIGTERM, "done", True, EXIT_DONE, "done"),
            (signal.SIGTERM, "diverged", True, EXIT_DIVERGED, "diverged"),
            (signal.SIGTERM, None, True, EXIT_RANK_FAILURE, "failed"),
            (signal.SIGTERM, None, False, EXIT_TERMINATED, "interrupted"),
            (signal.SIGINT, None, False, EXIT_INTERRUPTED, "interrupted"),
        ],
    )
    def test_exit_code_and_result(
        self,
        number: int,
        wrote: str | None,
        trained: bool,
        code: int,
        status: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.launcher import api

        (tmp_path / "plan.json").write_text("of an earlier start")
        os.utime(tmp_path / "plan.json", (1, 1))

        def stopped_ranks(*arguments: object) -> None:
            if trained:
                (tmp_path / "plan.json").write_text("{}")
            if wrote is not None:
                ends = {"done": EXIT_DONE, "diverged": EXIT_DIVERGED, "interrupted": EXIT_TERMINATED}
                write_result(tmp_path, wrote, ends[wrote], {}, None, None)
            raise SignalException("stopped", signal.Signals(number))

        monkeypatch.setattr(api, "elastic_launch", lambda settings, entry: stopped_ranks)
        got = launch(from_mapping({"run": {"dir": str(tmp_path)}}), tmp_path / "corpus")
        error = capsys.readouterr().err
        assert got == code, f"exit code {got}, expected {code}: {error}"
        result = read_result(tmp_path)
        assert result is not None, "no result.json"
        assert result["status"] == status, f"result.json says {result}, expected {status}"
        if wrote is None:
            assert result["message"] in error, f"{error!r} lacks {result['message']!r}"
            assert result["exit_code"] == code, f"result.json says {result}, expected {code}"


class TestSignals:
    """One stop, however often it is signalled within a few seconds, ends after the step; a later signal ends at once."""

    @pytest.fixture(autouse=True)
    def _handlers(self) -> Iterator[None]:
        kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        yield
        for number, handler in kept.items():
            signal.signal(number, handler)

    def test_repeated_signal_is_one_stop(self) -> None:
        trainer = SimpleNamespace(stop_signal=False)
        received = train._stop_on_signals(trainer)
        assert not trainer.stop_signal, "a stop was requested before any signal"
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert trainer.stop_signal, "the signal requested no stop"
        assert received == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT], f"received {received}"

    def test_impatient_signal_ends_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(train, "SIGNAL_PATIENCE_S", -1.0)
        train._stop_on_signals(SimpleNamespace(stop_signal=False))
        signal.raise_signal(signal.SIGINT)
        # The default action of SIGINT in C ends the process; Python's own default can be seen to come.
        raised: list[int] = []
        monkeypatch.setattr(signal, "raise_signal", raised.append)
        signal_handler = signal.getsignal(signal.SIGINT)
        assert callable(signal_handler)
        signal_handler(signal.SIGINT, None)
        assert raised == [signal.SIGINT], f"raised {raised}, expected SIGINT once more"
        action = signal.getsignal(signal.SIGINT)
        assert action == signal.SIG_DFL, f"SIGINT is handled by {action}, expected the default action"
