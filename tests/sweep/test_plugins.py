"""A configuration names things; it never gets Hydra to run code, whoever wrote it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from dist_mtp.errors import ConfigError
from dist_mtp.sweep import plugins
from dist_mtp.sweep.definition import define

MARKER = "marker"
"""Of a file that refused code would have made."""


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        define(["mtp.depth=0,1", *overrides])
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hydra.callbacks.x._target_=os.system", "_target_"),
        ("hydra.sweeper._target_=os.system", "_target_"),
        ("hydra.run.dir=elsewhere", "hydra.run.dir cannot be set"),
        ("hydra.job.chdir=true", "hydra.job.chdir cannot be set"),
        ("hydra/job_logging=default", "hydra.job_logging cannot be set"),
        ("hydra.sweeper.custom_search_space=os.system", "hydra.sweeper.custom_search_space is refused"),
        ("hydra.launcher.setup=[touch marker]", "hydra.launcher.setup is refused"),
        ("hydra/launcher=rq", "hydra/launcher=rq is not one of basic, joblib, submitit_local, submitit_slurm"),
        ("hydra/sweeper=optna", "hydra/sweeper=optna is not one of basic, optuna"),
    ],
)
def test_refused_on_the_command_line(override: str, words: str) -> None:
    said = refusal(override)
    assert words in said, said


@pytest.mark.parametrize("name", ["hydra/sweeper=optuna", "hydra/launcher=joblib", "hydra/launcher=submitit_slurm"])
def test_missing_plugin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named with what installs it, before Hydra fails at it."""
    hidden = ("hydra_optuna_sweeper", "hydra_joblib_launcher", "hydra_submitit_launcher")
    monkeypatch.setattr(plugins, "find_spec", lambda package: None if package.endswith(hidden) else find_spec(package))
    said = refusal(name)
    extra = {"optuna": "optuna", "joblib": "joblib", "submitit_slurm": "submitit"}[name.partition("=")[2]]
    assert f"pip install 'dist-mtp[{extra}]'" in said, said


@pytest.mark.parametrize(
    "section",
    [
        "callbacks: {x: {_target_: pathlib.Path.touch, self: marker}}",
        "sweeper: {_target_: pathlib.Path.touch}",
        "launcher: {_target_: pathlib.Path.touch}",
        "job_logging: {version: 1, handlers: {x: {(): pathlib.Path.touch}}}",
        "hydra_logging: {version: 1, handlers: {x: {class: logging.FileHandler, filename: marker}}}",
    ],
    ids=lambda text: text.partition(":")[0],
)
def test_refused_in_files(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a search path can write into Hydra's section, where it instantiates what it is told to."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "evil.yaml").write_text(f"# @package _global_\nhydra:\n  {section}\n")
    monkeypatch.chdir(tmp_path)
    said = refusal(f"hydra.searchpath=[file://{tmp_path}]", "experiment=evil")
    assert "is refused" in said, said
    assert not Path(MARKER).exists(), "the code was run"
