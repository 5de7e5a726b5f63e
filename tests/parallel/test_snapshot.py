"""Which checkpoint a run continues from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_mtp.checkpoint.format import TensorSlice
from dist_mtp.checkpoint.save import save
from dist_mtp.errors import CheckpointError
from dist_mtp.snapshot import _choose


def save_step(folder: Path, step: int) -> Path:
    piece = TensorSlice("param", "model.norm.weight", (4,), 0, torch.arange(4.0) + step)
    return save(
        folder, step=step, run_id="run", rank=0, world_size=1, slices=[piece], state={}, barrier=lambda: None, keep=9
    )


def damage(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


class TestChoice:
    """``auto`` takes the newest intact checkpoint and never trains over a folder whose checkpoints are all damaged; a named
    checkpoint must be intact and not be behind the folder's own."""

    def test_nothing_to_resume(self, tmp_path: Path) -> None:
        assert _choose("auto", tmp_path / "none", print) == ""

    def test_newest(self, tmp_path: Path) -> None:
        save_step(tmp_path, 1)
        newest = save_step(tmp_path, 2)
        assert _choose("auto", tmp_path, print) == str(newest)

    def test_falls_back_loudly(self, tmp_path: Path) -> None:
        older = save_step(tmp_path, 1)
        damage(save_step(tmp_path, 2))
        told: list[str] = []
        assert _choose("auto", tmp_path, told.append) == str(older)
        assert any("step_00000002" in line for line in told), told

    def test_interrupted_replacement(self, tmp_path: Path) -> None:
        """A kill between the two renames that replace a step leaves it under another name."""
        path = save_step(tmp_path, 3)
        aside = path.rename(path.with_name(path.name + ".old"))
        assert _choose("auto", tmp_path, print) == str(aside)

    def test_all_damaged(self, tmp_path: Path) -> None:
        damage(save_step(tmp_path, 1))
        with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
            _choose("auto", tmp_path, lambda _: None)

    def test_named_behind_the_folder(self, tmp_path: Path) -> None:
        named = save_step(tmp_path, 1)
        save_step(tmp_path, 2)
        with pytest.raises(CheckpointError, match="up to step 2, later than step 1"):
            _choose(str(named), tmp_path, print)

    def test_named_and_damaged(self, tmp_path: Path) -> None:
        named = save_step(tmp_path / "other", 1)
        damage(named)
        with pytest.raises(CheckpointError, match="SHA-256"):
            _choose(str(named), tmp_path, print)
