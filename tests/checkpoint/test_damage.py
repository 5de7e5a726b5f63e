"""Nothing that differs from what was committed is ever loaded."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint.rank_threads import WEIGHT, filled, save_ranks

from dist_mtp.checkpoint.folder import newest_first
from dist_mtp.checkpoint.load import CheckpointReader, find_latest
from dist_mtp.checkpoint.manifest import MANIFEST, MANIFEST_HASH
from dist_mtp.errors import CheckpointError

SHARD = "rank_00000.safetensors"


@pytest.fixture
def path(tmp_path) -> Path:
    """An intact checkpoint of step 2, with one of step 1 beside it."""
    save_ranks(tmp_path, 1, filled(1.0))
    return save_ranks(tmp_path, 2, filled(2.0), state={"rate": 1e-05})


def assert_skipped(path: Path, reason: str) -> None:
    """The reader refuses ``path``, and the search falls back to step 1 and says why."""
    with pytest.raises(CheckpointError, match=reason):
        CheckpointReader(path)
    messages: list[str] = []
    latest = find_latest(newest_first(path.parent), report=messages.append)
    assert latest == path.with_name("step_00000001"), f"found {latest}, messages {messages}"
    assert len(messages) == 1, f"one damaged checkpoint, but messages {messages}"
    assert str(path) in messages[0], f"message does not name {path}: {messages[0]}"


def test_every_flipped_bit_is_detected(path):
    """400 sampled bits over all files: flipped, none loads; a breach would load a changed weight silently."""
    generator = random.Random(0)
    files = sorted(path.iterdir())
    assert [file.name for file in files] == [MANIFEST, MANIFEST_HASH, SHARD, "rank_00001.safetensors"]
    for _ in range(100):
        for file in files:
            intact = file.read_bytes()
            bit = generator.randrange(len(intact) * 8)
            damaged = bytearray(intact)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"damaged|not valid JSON"):
                pytest.fail(f"bit {bit} of {file.name} went unnoticed: {CheckpointReader(path)}")
            file.write_bytes(intact)
    assert CheckpointReader(path).step == 2


@pytest.mark.parametrize("name", [MANIFEST, MANIFEST_HASH, SHARD])
@pytest.mark.parametrize("damage", ["truncate", "empty", "delete", "extend"])
def test_whole_file_damage(path, name, damage):
    """A file cut, emptied, lost or grown makes the checkpoint unusable, and the previous one is found."""
    file = path / name
    if damage == "delete":
        file.unlink()
    elif damage == "extend":
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        os.truncate(file, 0 if damage == "empty" else file.stat().st_size - 1)
    assert_skipped(path, name)


def test_sizes_are_checked_without_verify(path):
    """verify=False skips the hashes only: a truncated shard is still refused before any weight is read."""
    os.truncate(path / SHARD, 10)
    with pytest.raises(CheckpointError, match="has 10 bytes, manifest says"):
        CheckpointReader(path, verify=False)


class TestMixedCheckpoints:
    """A checkpoint is one run at one step: files of another never pass, though each is intact by itself."""

    def test_shard_of_another_step(self, path):
        shutil.copy(path.with_name("step_00000001") / SHARD, path / SHARD)
        assert_skipped(path, "damaged or from another checkpoint")

    def test_shard_of_another_run(self, path, tmp_path):
        other = save_ranks(tmp_path / "other", 2, filled(2.0), run_ids=["nur", "nur"])
        assert torch.equal(CheckpointReader(other).read_full("param", WEIGHT), torch.full((3, 4), 2.0))
        shutil.copy(other / SHARD, path / SHARD)
        assert_skipped(path, "damaged or from another checkpoint")

    def test_swapped_shards(self, path):
        (path / SHARD).rename(path / "x")
        (path / "rank_00001.safetensors").rename(path / SHARD)
        (path / "x").rename(path / "rank_00001.safetensors")
        assert_skipped(path, "damaged or from another checkpoint")

    def test_extra_shard(self, path):
        shutil.copy(path / SHARD, path / "rank_00002.safetensors")
        assert_skipped(path, r"rank_00002\.safetensors is not part of this checkpoint")

    def test_manifest_of_another_step(self, path):
        for name in (MANIFEST, MANIFEST_HASH):
            shutil.copy(path.with_name("step_00000001") / name, path / name)
        assert_skipped(path, "holds step 1, its name says 2")

    def test_renamed_folder(self, path):
        assert_skipped(path.rename(path.with_name("step_00000020")), "holds step 2, its name says 20")

    def test_uncommitted_folder(self, path):
        with pytest.raises(CheckpointError, match="not a committed checkpoint"):
            CheckpointReader(path.rename(path.with_name("step_00000002.tmp")))


def forge(path: Path, edit) -> None:
    """Change the manifest as an attacker would: ``edit`` the document, then make its hash right again."""
    document = json.loads((path / MANIFEST).read_text())
    text = edit(document) or json.dumps(document)
    (path / MANIFEST).write_text(text)
    (path / MANIFEST_HASH).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}\n")


def put(*keys, value):
    """Edit that sets the field at ``keys``; the word ``weight`` stands for the tensor's key."""

    def edit(document) -> None:
        place = document
        for key in keys[:-1]:
            place = place[f"param/{WEIGHT}" if key == "weight" else key]
        place[keys[-1]] = value

    return edit


def rename_shard(name: str):
    """Edit that moves the first shard's entry, and the slice in it, to ``name``."""

    def edit(document) -> None:
        document["files"][name] = document["files"].pop(SHARD)
        document["tensors"][f"param/{WEIGHT}"]["slices"][0]["file"] = name

    return edit


FORGERIES = {
    "parent": (rename_shard("../step_00000001/rank_00000.safetensors"), "is not of the form"),
    "absolute": (rename_shard("/etc/passwd"), "is not of the form"),
    "subfolder": (rename_shard("a/rank_00000.safetensors"), "is not of the form"),
    "newline": (rename_shard(f"{SHARD}\n"), "is not of the form"),
    "pickle name": (rename_shard("rank_00000.pt"), "is not of the form"),
    "unlisted file": (put("tensors", "weight", "slices", 0, "file", value="rank_00009.safetensors"), "does not list"),
    "other format": (put("format", value="other"), "expected 'dist_mtp.checkpoint'"),
    "newer version": (put("version", value=2), "version is 2, this dist_mtp reads 1"),
    "step is text": (put("step", value="2"), "'step' is str, expected int"),
    "step is bool": (put("step", value=True), "'step' is bool, expected int"),
    "negative step": (put("step", value=-2), "'step' is -2"),
    "state is a list": (put("state", value=[]), "'state' is list, expected dict"),
    "document is a list": (lambda document: "[]", "is list, expected dict"),
    "nan": (lambda document: '{"format": NaN}', "not valid JSON"),
    "nested": (lambda document: "[" * 100_000, "not valid JSON"),
    "digits": (lambda document: "1" * 10_000, "not valid JSON"),
    "absurd file": (put("files", SHARD, "bytes", value=2**60), "'bytes' is 1152921504606846976"),
    "hash": (put("files", SHARD, "sha256", value="0" * 63 + "G"), "64 lower-case hexadecimal digits"),
    "absurd shape": (put("tensors", "weight", "shape", value=[2**49, 2**49]), "is absurd"),
    "shape below slices": (put("tensors", "weight", "shape", value=[11]), "smaller than the slices"),
    "unbacked shape": (put("tensors", "weight", "shape", value=[2**40]), "element 12 of 1099511627776 is in no file"),
    "unbacked slice": (
        lambda document: (
            put("tensors", "weight", "shape", value=[2**40])(document),
            put("tensors", "weight", "slices", 1, "numel", value=2**40 - 6)(document),
        )[0],
        "slices in rank_00001.safetensors take",
    ),
    "negative shape": (put("tensors", "weight", "shape", value=[-3, -4]), "sane sizes"),
    "dimensions": (put("tensors", "weight", "shape", value=[1] * 100_000), "sane sizes"),
    "dtype": (put("tensors", "weight", "dtype", value="object"), "dtype 'object' is none of"),
    "negative start": (put("tensors", "weight", "slices", 0, "start", value=-1), "'start' is -1"),
    "empty slice": (put("tensors", "weight", "slices", 0, "numel", value=0), "empty slice"),
    "gap": (put("tensors", "weight", "slices", 0, "numel", value=5), "element 5 of 12 is in no file"),
    "overlap": (put("tensors", "weight", "slices", 0, "numel", value=7), r"elements \[6, 7\) are in both"),
    "missing field": (lambda document: document.pop("run_id") and None, "'run_id' is missing"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_manifest(path, name):
    """A manifest with a correct hash but hostile contents is refused before any shard is opened."""
    edit, reason = FORGERIES[name]
    forge(path, edit)
    assert_skipped(path, reason)


class TestHostileFiles:
    """What lies under a shard's name is opened only if it is a regular file of the right size and hash."""

    def test_symlinked_shard(self, path, tmp_path):
        (path / SHARD).rename(tmp_path / "outside")
        (path / SHARD).symlink_to(tmp_path / "outside")
        assert_skipped(path, "is not a regular file")

    def test_shard_swapped_for_a_link_after_verification(self, path, tmp_path):
        reader = CheckpointReader(path)
        (path / SHARD).rename(tmp_path / "outside")
        (path / SHARD).symlink_to(tmp_path / "outside")
        with pytest.raises(CheckpointError, match="is not a regular file"):
            reader.read_full("param", WEIGHT)

    @pytest.mark.parametrize("name", [MANIFEST, MANIFEST_HASH])
    def test_symlinked_manifest(self, path, tmp_path, name):
        (path / name).rename(tmp_path / "outside")
        (path / name).symlink_to(tmp_path / "outside")
        assert_skipped(path, "is not a regular file")

    def test_pipe_does_not_block(self, path):
        (path / SHARD).unlink()
        os.mkfifo(path / SHARD)
        assert_skipped(path, "is not a regular file")

    def test_symlinked_checkpoint_folder_is_no_candidate(self, path):
        path.with_name("step_00000003").symlink_to(path)
        assert find_latest(newest_first(path.parent), report=pytest.fail) == path

    def test_pickle_is_never_executed(self, path, tmp_path):
        marker = tmp_path / "executed"

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        data = pickle.dumps(Payload()) + b"." * 200
        (path / SHARD).write_bytes(data)
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        forge(path, put("files", SHARD, value=entry))
        with pytest.raises(CheckpointError, match="cannot read"):
            CheckpointReader(path).read_full("param", WEIGHT)
        assert not marker.exists(), f"loading created {marker}"

    def test_stored_tensor_must_be_what_the_manifest_says(self, path):
        """A shard is a valid safetensors file, but its tensor has another type than its slice."""
        forge(path, put("tensors", "weight", "dtype", value="int32"))
        with pytest.raises(CheckpointError, match=r"is \[6\] torch.float32, manifest says \[6\] int32"):
            CheckpointReader(path).read_full("param", WEIGHT)
