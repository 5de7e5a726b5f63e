"""What a command line with ``-m`` asks for, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_mtp.config import Config
from dist_mtp.errors import ConfigError
from dist_mtp.sweep.definition import define, expand, point_name


class TestPointNames:
    """A point's folder is one folder with a readable name, the same in every sweep, and never that of another point."""

    @pytest.mark.parametrize(
        ("overrides", "name"),
        [
            (["mtp.depth=0"], "mtp.depth=0"),
            (["train.seed=1", "mtp.depth=0"], "mtp.depth=0,train.seed=1"),
            (["train.steps=9", "+mtp.depth=0"], "mtp.depth=0"),
            (["train.steps=9"], "point"),
            (["pipeline.layout='3,2'"], "pipeline.layout=3,2"),
        ],
        ids=str,
    )
    def test_readable(self, overrides: list[str], name: str) -> None:
        assert point_name(overrides, shared=["train.steps"]) == name

    def test_unusual_characters(self) -> None:
        """Replaced, and told apart by a hash."""
        outside, same_letters = point_name(["data.path=../../etc"], []), point_name(["data.path=..:..:etc"], [])
        assert "/" not in outside, outside
        assert outside.startswith("data.path=.._.._etc-"), outside
        assert outside != same_letters, f"two points would share {outside}"

    def test_long(self) -> None:
        names = {point_name([f"data.path={'x' * 300}{end}"], []) for end in "ab"}
        assert len(names) == 2, f"two points would share {names}"
        assert all(len(name.encode()) < 255 for name in names), {len(name) for name in names}


class TestGrid:
    """Points are those of Hydra's own sweeper, in its order, and each is checked as a single run is."""

    def test_points(self) -> None:
        points = expand(["mtp.depth=0,1", "optim.lr=1e-3,3e-4", "train.steps=7", "run.name=x"])
        found = [(p.number, p.folder, p.config.mtp.depth, p.config.optim.lr, p.config.train.steps) for p in points]
        expected = [
            (number, Path(f"sweeps/x/mtp.depth={depth},optim.lr={rate}"), depth, rate, 7)
            for number, (depth, rate) in enumerate((d, r) for d in (0, 1) for r in (0.001, 0.0003))
        ]
        assert found == expected, f"{found}\n{expected}"
        assert [point.config.run_dir for point in points] == [str(point.folder) for point in points]

    def test_groups_ranges_and_folder(self) -> None:
        points = expand(["mtp=off,d2", "train.seed=range(3,5)", "run.dir='a b'"])
        found = [(point.config.mtp.depth, point.config.train.seed, point.folder.parent) for point in points]
        assert found == [(0, 3, Path("a b")), (0, 4, Path("a b")), (2, 3, Path("a b")), (2, 4, Path("a b"))], found

    def test_no_point_is_the_default(self) -> None:
        """Every value of the command line is in every point."""
        for point in expand(["mtp.depth=2,3", "optim.lr=7e-4", "precision=bf16"]):
            config, default = point.config, Config()
            assert (config.optim.lr, config.precision.name) == (7e-4, "bf16"), f"{point.overrides} became {config}"
            assert config.mtp.depth != default.mtp.depth, f"{point.overrides} has the default depth"

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["run.dir=a,b"], ["run.dir cannot be swept", "folder of its own"]),
            (["resume=auto,never"], ["resume cannot be swept"]),
            (["mtp.deth=0,1"], ["unknown key 'mtp.deth'", "mtp.depth"]),
            (["optim.lr=interval(1e-4,1e-2)"], ["a grid needs values", "hydra/sweeper=optuna"]),
            (["optim.lr=[1,"], ["optim.lr"]),
            (["mtp.depth=0,-1"], ["mtp.depth=-1"]),
        ],
        ids=str,
    )
    def test_mistakes(self, overrides: list[str], words: list[str]) -> None:
        with pytest.raises(ConfigError) as caught:
            expand(overrides)
        assert all(word in str(caught.value) for word in words), caught.value

    def test_a_search_cannot_be_listed(self) -> None:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        with pytest.raises(ConfigError, match="only a grid can be listed before"):
            expand(["hydra/sweeper=optuna", "optim.lr=interval(1e-4,1e-2)"])


class TestDefinition:
    def test_keys(self) -> None:
        sweep = define(["mtp.depth=0,1", "optim.lr=1e-3", "train.seed=1,2,3"])
        assert (sweep.swept, sweep.shared, sweep.num_points) == (("mtp.depth", "train.seed"), ("optim.lr",), 6), sweep

    def test_search_repeats_itself(self) -> None:
        """Optuna's defaults would give other trials at each start, and end the sweep at the first that diverges."""
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=5", "optim.lr=interval(1e-4,1e-2)"]
        sweep = define(search)
        assert sweep.num_points == 5, sweep.num_points
        added = set(sweep.overrides) - set(search)
        expected = {"hydra.sweeper.sampler.seed=1234", "hydra.sweeper.max_failure_rate=1", "hydra.sweeper.n_jobs=1"}
        assert added == expected, f"{added} != {expected}"
        own = define([*search, "hydra.sweeper.sampler.seed=7"])
        assert "hydra.sweeper.sampler.seed=1234" not in own.overrides, own.overrides
