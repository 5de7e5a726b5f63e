"""A rank that stops without dying: the run must end by itself and say where it stood."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from support import launches
from support.launches import Running, overrides

from dist_mtp.errors import EXIT_RANK_FAILURE
from dist_mtp.monitor.result import read_result

HANG_TIMEOUT_S = 8
"""Long enough for the imports of a start on a busy machine, which are not progress either."""
TORCHRUN_GRACE_S = 30
"""torchrun's fixed time between SIGTERM and SIGKILL for the ranks that outlive a failed one."""
SLACK_S = 40
"""For a machine that other tests keep busy."""


class TestStoppedRank:
    """A rank that makes no progress ends the run with 5: the waiting rank's log has its stacks and the step and action
    it waits in, the launcher names ranks, and no process stays behind."""

    def test_ends_by_itself(self, tmp_path: Path) -> None:
        limits = ("train.steps=5000", f"train.hang_timeout_s={HANG_TIMEOUT_S}")
        command = overrides(tmp_path, "hang", *limits, "monitor.progress=bar")
        running = Running(launches.dist_mtp(*command), tmp_path / "hang")
        running.wait_for_step(3)
        os.kill(running.rank_pids()[1], signal.SIGSTOP)
        stopped = time.monotonic()
        ended = running.end()
        seconds = time.monotonic() - stopped

        assert ended.code == EXIT_RANK_FAILURE, f"exited {ended.code}, expected {EXIT_RANK_FAILURE}:\n{ended.output}"
        limit = HANG_TIMEOUT_S + TORCHRUN_GRACE_S + SLACK_S
        assert seconds < limit, f"ended {seconds:.0f} s after the stop, expected less than {limit}"
        assert "error: rank 0 failed or stopped making progress" in ended.output, ended.output
        assert "rank 1 did not react" in ended.output, ended.output
        after_bar = ended.output.rpartition("\x1b[2K")[2]
        assert "ETA" in ended.output, f"there was no bar: {ended.output}"
        assert "ETA" not in after_bar, f"the progress bar was left on the terminal: {after_bar!r}"
        result = read_result(ended.folder)
        assert result is not None, "no result.json"
        got = (result["status"], result["exit_code"])
        assert got == ("failed", EXIT_RANK_FAILURE), f"result.json says {got}"

        log = ended.log(0)
        assert re.search(r"no progress for \d+ s in: step \d+, \w+", log), f"no phase in rank 0's log:\n{log}"
        stacks = log[log.index("no progress for") :]
        for part in ("Current thread", "most recent call first", "trainer.py"):
            assert part in stacks, f"{part!r} is missing in rank 0's stacks:\n{stacks}"
