"""result.json is whole or absent, and says exactly how a run ended."""

import json
import math

import pytest

from dist_mtp.errors import DataError
from dist_mtp.monitor.atomic import replace_text
from dist_mtp.monitor.result import read_result, write_result


def test_result_round_trips(tmp_path):
    """A sweep reads the same objective, to the bit, that the run wrote; a run still going has no result."""
    assert read_result(tmp_path) is None, "there is a result before the run ended"
    write_result(tmp_path, "done", 0, {"step": 3, "loss": 1 / 3}, 0.1 + 0.2, None)
    expected = {"status": "done", "exit_code": 0, "objective": 0.1 + 0.2, "message": None}
    read = read_result(tmp_path)
    assert read == expected | {"metrics": {"step": 3, "loss": 1 / 3}}, read


def test_diverged_result_is_strict_json(tmp_path):
    """The runs that fail are those whose result has NaN; scripts in other languages must be able to read it."""
    write_result(tmp_path, "diverged", 4, {"loss": math.nan}, math.inf, "inf")
    text = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert (text["metrics"]["loss"], text["objective"]) == ("nan", "inf"), text
    read = read_result(tmp_path)
    assert math.isnan(read["metrics"]["loss"]), read
    assert (read["objective"], read["message"]) == (math.inf, "inf"), read


def test_damaged_result_is_named(tmp_path):
    """A file that dist_mtp cannot have written is an error with its path, not an empty result."""
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(DataError, match=r"result\.json is damaged"):
        read_result(tmp_path)


def test_failed_replacement_keeps_the_old_text(tmp_path):
    """A write that fails halfway leaves the old file whole and nothing beside it."""
    path = tmp_path / "result.json"
    replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new" * 100_000 + "\ud800")  # a lone surrogate is no UTF-8
    assert path.read_text() == "old", path.read_text()[:20]
    left = [entry.name for entry in tmp_path.iterdir()]
    assert left == ["result.json"], f"left behind: {left}"
