"""The watchdog without ranks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from dist_mtp.errors import EXIT_RANK_FAILURE
from dist_mtp.parallel.watchdog import Watchdog


class TestWatchdog:
    """No beat for the timeout writes the phase and all stacks, then ends the process with exit code 5; beats hold it off."""

    def test_fires(self, tmp_path: Path) -> None:
        fired = threading.Event()
        codes: list[int] = []

        def end(code: int) -> None:
            codes.append(code)
            fired.set()

        with (tmp_path / "log").open("w") as log:
            watchdog = Watchdog(0.2, log, exit_process=end)
            watchdog.beat("step 3, action 2F1")
            assert fired.wait(10), "the watchdog never fired"
            watchdog.stop()
        text = (tmp_path / "log").read_text()
        assert codes == [EXIT_RANK_FAILURE], f"exit codes {codes}, expected {[EXIT_RANK_FAILURE]}"
        assert "step 3, action 2F1" in text, text
        assert "test_watchdog.py" in text, f"no stack of this test in {text}"

    def test_beats_hold_it_off(self, tmp_path: Path) -> None:
        codes: list[int] = []
        with (tmp_path / "log").open("w") as log:
            watchdog = Watchdog(1.0, log, exit_process=codes.append)
            for _ in range(15):
                time.sleep(0.1)
                watchdog.beat("working")
            watchdog.stop()
        assert codes == [], f"fired with {codes} although work went on"
