"""What the engine does with experts that ranks share: groups of the optimizer, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.engine_world import BEGUN_IN, CONTINUED_IN, continued
from support.parity import GRADIENT_BOUND, STEPS, Layout, relative, run_dir, write_corpus
from support.ranks import run_ranks
from support.worlds import BALANCED

from dist_mtp.checkpoint.load import CheckpointReader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reshard")
    write_corpus(path / "text")
    run_ranks("support.engine_world:world_of_4", 4, path / "world_4", timeout_s=300)
    return path / "world_4"


class TestGroups:
    """A rank whose optimizer groups differ would make DeepSpeed wait forever in the first step; every rank says so at the
    start instead."""

    @pytest.mark.parametrize("rank", range(4))
    def test_refused_on_all_ranks(self, folder: Path, rank: int) -> None:
        message = (folder / f"refusal.rank{rank}").read_text()
        assert "ranks [2]" in message, message
        assert "optimizer groups" in message, message


class TestReshard:
    """A checkpoint is of a model, not of a layout: any number of pipeline ranks, replicas and ranks that share experts
    goes on from the same parameters, moments, biases and loads. An expert restored under a neighbour's number would
    differ in every element."""

    @pytest.mark.parametrize("layout", CONTINUED_IN, ids=str)
    def test_goes_on(self, folder: Path, layout: Layout) -> None:
        uninterrupted, resumed = (
            load_file(run / "dumps" / f"step_{STEPS}.safetensors")
            for run in (run_dir(folder, BEGUN_IN, BALANCED), continued(folder, layout))
        )
        assert uninterrupted.keys() == resumed.keys(), sorted(uninterrupted.keys() ^ resumed.keys())
        for name, expected in uninterrupted.items():
            if layout == BEGUN_IN or name.startswith(("param/", "bias/", "batch/")):
                assert torch.equal(resumed[name], expected), f"{name} differs"
            elif name.startswith("grad/"):
                distance = relative(resumed[name], expected)
                assert distance <= GRADIENT_BOUND, f"{name}: {distance:.1e}, bound {GRADIENT_BOUND:.1e}"

    @pytest.mark.parametrize("layout", CONTINUED_IN, ids=str)
    def test_what_the_next_step_writes(self, folder: Path, layout: Layout) -> None:
        """Moments and loads do not show in a dump: they show in what the step made of them."""
        tensors: list[dict[str, torch.Tensor]] = []
        for run in (run_dir(folder, BEGUN_IN, BALANCED), continued(folder, layout)):
            tensors.append(read_checkpoint(run / "checkpoints" / f"step_{STEPS:08d}"))
        expected, found = tensors
        assert expected.keys() == found.keys(), sorted(expected.keys() ^ found.keys())
        for name, tensor in expected.items():
            distance = relative(found[name], tensor)
            # Adam divides by the root of tiny second moments: parameters where gradients are rounding noise move freely.
            bound = 1e-4 if name.startswith("param/") else 5 * GRADIENT_BOUND
            assert distance <= bound, f"{name}: {distance:.1e}, bound {bound:.1e}"
        loads = [name for name in expected if name.endswith("load_share")]
        assert len(loads) == 6, loads


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, as ``kind/name``."""
    reader = CheckpointReader(path)
    return {key: reader.read_full(*key.split("/", 1)) for key in reader.tensors}
