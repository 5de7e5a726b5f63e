"""What was saved by any layout is read by any other, bit by bit."""

from __future__ import annotations

import random
import re

import pytest
import torch
from checkpoint.rank_threads import WEIGHT, cut, filled, save_ranks
from safetensors.torch import load_file

from dist_mtp.checkpoint.files import write_tensors
from dist_mtp.checkpoint.folder import newest_first
from dist_mtp.checkpoint.format import DTYPES, TensorSlice
from dist_mtp.checkpoint.load import CheckpointReader, find_latest
from dist_mtp.errors import CheckpointError


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Every bit pattern may occur, NaN payloads and negative zeros included."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_round_trip_is_bitwise(dtype, tmp_path):
    """read_full returns the bits that were saved, for every element type the format stores."""
    tensor = random_bits(dtype, (5, 7))
    path = save_ranks(tmp_path, 3, [cut("param", WEIGHT, tensor, [0, 35])])
    found = CheckpointReader(path).read_full("param", WEIGHT)
    assert found.shape == tensor.shape, f"read {found.shape}, saved {tensor.shape}"
    assert found.dtype == dtype, f"read {found.dtype}, saved {dtype}"
    assert bits(found) == bits(tensor), f"read {bits(found)}, saved {bits(tensor)}"


def test_odd_slices_of_three_ranks_are_read_as_any_range(tmp_path):
    """read(start, numel) equals flat[start:start+numel] for every range, wherever the cuts of the writers were."""
    tensor = torch.arange(20, dtype=torch.int64).view(4, 5)
    a, b, c, d = cut("param", WEIGHT, tensor, [0, 7, 8, 8, 20])
    path = save_ranks(tmp_path, 1, [[b], [d, a], [c]])
    reader = CheckpointReader(path)
    for start in range(21):
        for numel in range(21 - start):
            found, expected = reader.read("param", WEIGHT, start, numel), tensor.reshape(-1)[start : start + numel]
            assert torch.equal(found, expected), f"[{start}, {start + numel}): read {found}, saved {expected}"


def test_random_layouts(tmp_path):
    """Random tensors cut at random places over random ranks come back bitwise: no layout is special."""
    generator = random.Random(0)
    for step in range(1, 9):
        world_size = generator.randint(1, 4)
        tensors = {
            f"model.layers.{layer}.weight": torch.randn(generator.randint(1, 9), generator.randint(1, 9))
            for layer in range(5)
        }
        ranks = [[] for _ in range(world_size)]
        for name, tensor in tensors.items():
            inner = [generator.randint(0, tensor.numel()) for _ in range(generator.randint(0, 5))]
            for piece in cut("exp_avg", name, tensor, sorted([0, *inner, tensor.numel()])):
                generator.choice(ranks).append(piece)
        reader = CheckpointReader(save_ranks(tmp_path, step, ranks))
        for name, tensor in tensors.items():
            found = reader.read_full("exp_avg", name, shape=tuple(tensor.shape))
            assert torch.equal(found, tensor), f"step {step} {name}: read {found}, saved {tensor}"


def test_what_a_reader_tells(tmp_path):
    """Step, run, state (floats exactly) and the table of tensors survive; kinds do not mix."""
    state = {"tokens": 2**60 + 1, "lr": 0.1 + 0.2, "order": {"seed": 7}, "text": "ü\n"}
    pieces = [
        *cut("param", "b", torch.ones(2, 3), [0, 6]),
        *cut("exp_avg", "b", torch.zeros(6), [0, 6]),
        *cut("param", "a", torch.tensor(2.5), [0, 1]),
        TensorSlice("param", "none", (0, 4), 0, torch.empty(0)),
    ]
    path = save_ranks(tmp_path, 123, [pieces], run_ids=["the run"], state=state)
    reader = CheckpointReader(path)
    assert path == tmp_path / "step_00000123"
    assert (reader.step, reader.run_id) == (123, "the run")
    assert reader.state == state, f"read {reader.state}, saved {state}"
    assert reader.names("param") == ["a", "b", "none"]
    assert {key: (entry.shape, entry.dtype) for key, entry in reader.tensors.items()} == {
        "param/a": ((), "float32"),
        "param/b": ((2, 3), "float32"),
        "param/none": ((0, 4), "float32"),
        "exp_avg/b": ((6,), "float32"),
    }
    assert reader.read_full("param", "a").item() == 2.5
    assert reader.read_full("param", "none").shape == (0, 4)
    assert reader.read_full("exp_avg", "b").sum() == 0


def test_read_converts_and_never_aliases(tmp_path):
    """A bf16 tensor is read as fp32 exactly, and writing into the result does not change the checkpoint."""
    tensor = torch.randn(6).to(torch.bfloat16)
    reader = CheckpointReader(save_ranks(tmp_path, 1, [cut("param", WEIGHT, tensor, [0, 6])]))
    found = reader.read("param", WEIGHT, 1, 4, torch.float32)
    assert found.dtype == torch.float32, f"read {found.dtype}, asked for torch.float32"
    assert torch.equal(found, tensor[1:5].float()), f"read {found}, saved {tensor[1:5]}"
    reader.read("param", WEIGHT, 0, 6).zero_()
    again = CheckpointReader(reader.path).read("param", WEIGHT, 0, 6)
    assert torch.equal(again, tensor), f"read {again}, saved {tensor}"


def test_views_of_one_buffer_and_device_like_inputs(tmp_path):
    """ZeRO keeps all parameters in one flat buffer; disjoint, strided and repeated views of it are stored by value."""
    flat = torch.arange(12.0)
    pieces = [
        TensorSlice("param", "a", (4,), 0, flat[:4]),
        TensorSlice("param", "strided", (4,), 0, flat[4::2]),
        TensorSlice("param", "tied", (4,), 0, flat[:4]),
        TensorSlice("param", "overlapping", (3,), 0, flat[2:5]),
        TensorSlice("param", "with_grad", (2,), 0, torch.ones(2, requires_grad=True)),
    ]
    reader = CheckpointReader(save_ranks(tmp_path, 1, [pieces]))
    for piece in pieces:
        found = reader.read_full("param", piece.name)
        assert torch.equal(found, piece.data), f"{piece.name}: read {found}, saved {piece.data}"


class TestReaderRefuses:
    """A wrong question is answered with names and numbers, not with wrong elements."""

    @pytest.fixture
    def reader(self, tmp_path):
        return CheckpointReader(save_ranks(tmp_path, 1, filled(1.0)))

    def test_unknown_name(self, reader):
        with pytest.raises(CheckpointError, match=f"the nearest is '{re.escape(WEIGHT)}'"):
            reader.read_full("param", WEIGHT.replace("5", "6"))

    def test_unknown_kind(self, reader):
        with pytest.raises(CheckpointError, match="nothing of kind 'exp_avg'"):
            reader.read_full("exp_avg", WEIGHT)

    def test_other_shape(self, reader):
        with pytest.raises(CheckpointError, match=r"checkpoint has \[3, 4\], model has \[4, 3\]"):
            reader.read("param", WEIGHT, 0, 1, shape=(4, 3))

    @pytest.mark.parametrize(("start", "numel"), [(-1, 2), (0, 13), (12, 1), (3, -1)])
    def test_range_outside(self, reader, start, numel):
        with pytest.raises(CheckpointError, match="were asked for, it has 12"):
            reader.read("param", WEIGHT, start, numel)


def test_find_latest_without_checkpoints(tmp_path):
    """A first run has no folder yet: that is no error and nothing to report."""
    messages: list[str] = []
    assert find_latest(newest_first(tmp_path / "checkpoints"), report=messages.append) is None
    assert messages == []


def test_write_tensors_is_plain_safetensors(tmp_path):
    """A dump opens with safetensors alone, replaces an older one, and leaves no temporary file."""
    weight = torch.randn(3, 4)
    path = tmp_path / "step_1.safetensors"
    write_tensors(path, {"param/old": weight}, {})
    write_tensors(path, {"param/a": weight, "param/tied": weight, "param/t": weight.t()}, {"step": "1"})
    found = load_file(path)
    assert set(found) == {"param/a", "param/tied", "param/t"}
    assert torch.equal(found["param/t"], weight.t()), f"read {found['param/t']}, wrote {weight.t()}"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_write_tensors_names_the_file_it_cannot_write(tmp_path):
    """A missing folder is a CheckpointError with the path, not safetensors' own exception."""
    with pytest.raises(CheckpointError, match=r"missing/a\.safetensors"):
        write_tensors(tmp_path / "missing" / "a.safetensors", {"a": torch.ones(1)}, {})
