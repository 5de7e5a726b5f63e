"""A stop signal that reaches only one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.parity import write_corpus
from support.ranks import run_ranks
from support.stopping import MOMENTS, STOP_STEP, stop_one_rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stop")
    write_corpus(path / "text")
    run_ranks(f"{stop_one_rank.__module__}:{stop_one_rank.__name__}", 2, path / "ranks", timeout_s=120)
    return path / "ranks"


class TestOneRankIsTold:
    """Whenever the signal arrives, all ranks end after the same step, with its checkpoint committed. A rank that acted on its
    own would wait in the checkpoint while the other waits in the next step."""

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_all_stop_together(self, folder: Path, moment: str) -> None:
        ends = [json.loads((folder / f"{moment}.rank_{rank}.json").read_text()) for rank in range(2)]
        expected = {"step": STOP_STEP, "stopping": True, "evaluated": True}
        assert ends == [expected, expected], f"{ends}, expected twice {expected}"
        checkpoints = [path.name for path in (folder / moment / "checkpoints").iterdir()]
        assert checkpoints == [f"step_{STOP_STEP:08d}"], checkpoints
