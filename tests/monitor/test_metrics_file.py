"""metrics.jsonl is exact, survives crashes, and does not show whether a run was interrupted."""

import json
import math
import random
import struct

import pytest

from dist_mtp.errors import DataError
from dist_mtp.monitor.metrics import TIMING_KEYS, MetricsFile, comparable, read_metrics


def row(step):
    return {"step": step, "tokens": 512 * step, "loss": 1 / (step + 2), "step_time": 0.1}


def write_rows(path, steps, resume_step=None):
    file = MetricsFile(path, resume_step)
    for step in steps:
        file.write(row(step))
    return file


def test_floats_round_trip_to_the_last_bit(tmp_path):
    """A float reads back with the same 64 bits; rounding to any number of digits would change some of them."""
    rng = random.Random(0)
    bits = [rng.getrandbits(64) for _ in range(2000)]
    floats = [value for (value,) in (struct.unpack("<d", struct.pack("<Q", b)) for b in bits) if math.isfinite(value)]
    floats += [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3]
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    for step, value in enumerate(floats, start=1):
        file.write({"step": step, "loss": value})
    read = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(read) == len(floats), f"{len(read)} rows read, {len(floats)} written"
    for got, want in zip(read, floats, strict=True):
        assert struct.pack("<d", got) == struct.pack("<d", want), f"read {got!r}, wrote {want!r}"


def test_non_finite_floats_are_strict_json(tmp_path):
    """A diverged step is a line that any JSON reader accepts, and keeps which kind of non-finite it was."""
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, None).write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON: {path.read_text()}")

    text = json.loads(path.read_text(), parse_constant=refuse)
    assert text == {"step": 1, "loss": "nan", "grad_norm": "inf", "lr": "-inf"}, text
    (read,) = read_metrics(path)
    assert math.isnan(read["loss"]), read
    assert (read["grad_norm"], read["lr"]) == (math.inf, -math.inf), read


def test_rows_are_on_disk_when_write_returns(tmp_path):
    """A killed process loses no finished step: rows do not wait in a buffer."""
    file = write_rows(tmp_path / "metrics.jsonl", [1, 2])
    read = len(read_metrics(tmp_path / "metrics.jsonl"))
    assert read == 2, f"{read} of 2 rows are on disk while the file is open"
    file.close()


def test_resumed_file_equals_uninterrupted_one(tmp_path):
    """Steps after the checkpoint are trained again and must not appear twice; earlier bytes stay as they were."""
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write_rows(whole, range(1, 11)).close()
    write_rows(resumed, range(1, 8)).close()
    write_rows(resumed, range(5, 11), resume_step=4).close()
    assert resumed.read_bytes() == whole.read_bytes(), f"{resumed.read_text()}\nis not\n{whole.read_text()}"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["resumed.jsonl", "whole.jsonl"], f"temporary files were left: {left}"


def test_torn_last_line_is_dropped(tmp_path):
    """A crash in the middle of a write costs that row only, and the next run appends on a line of its own."""
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [1, 2, 3]).close()
    path.write_bytes(path.read_bytes()[:-20])
    steps = [r["step"] for r in read_metrics(path)]
    assert steps == [1, 2], f"read steps {steps}, expected [1, 2]"
    write_rows(path, [3], resume_step=2).close()
    assert read_metrics(path) == [row(1), row(2), row(3)], path.read_text()


def test_damage_elsewhere_names_the_line(tmp_path):
    """Only the last line can be torn; any other is damage that the user must know about."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2 of 3"):
        read_metrics(path)


def test_new_run_starts_an_empty_file(tmp_path):
    """Without a checkpoint to resume from, rows of an earlier attempt are gone."""
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [1, 2]).close()
    write_rows(path, [1]).close()
    assert read_metrics(path) == [row(1)], path.read_text()


def test_comparable_drops_timings_and_nothing_else():
    """Bitwise resume tests compare every metric except those that a busy machine changes."""
    learnt = {"step": 3, "tokens": 9, "loss": 1.5, "loss_mtp_1": 2.5, "eval_loss_main": 1.25, "lr": 1e-4, "skipped": 0}
    kept = comparable(learnt | dict.fromkeys(TIMING_KEYS, 1.0))
    assert kept == learnt, f"{kept} is not {learnt}"


def test_bytes_between_ranks_are_comparable_and_waiting_is_not():
    """Equal runs route equal tokens, so they send equal bytes; how long a rank waits for them is the machine's affair."""
    kept = comparable({"all_to_all_bytes": 4096.0, "all_to_all_wait_s": 0.25})
    assert kept == {"all_to_all_bytes": 4096.0}, kept


def test_measured_steps_are_comparable():
    """What a clock said, and what a rank holds, is no result; a key that only resembles one of those is."""
    measured = {
        "bubble": 0.2,
        "bubble_plan": 0.1,
        "p2p_wait_s": 0.5,
        "stage_12_busy_share": 0.5,
        "memory_rank_3_gib": 1.5,
    }
    kept = comparable(measured | {"loss": 2.0, "stage_1_loss": 3.0})
    assert kept == {"loss": 2.0, "stage_1_loss": 3.0}, kept
