"""The YAML files of ``conf/`` and the overrides on top of them, as a command line composes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dist_mtp.cli.compose import compose, config_groups
from dist_mtp.config import Config
from dist_mtp.errors import ConfigError
from dist_mtp.typed_config import valid_keys

CONF = Path(__file__).parents[2] / "conf"
GROUPS = config_groups()
MEMBERS = [(group, member) for group, members in sorted(GROUPS.items()) for member in members]
NEEDED = {
    ("launcher", "none"): ["parallel.pp=1"],
    ("data", "text"): ["data.path=somewhere"],
    ("data", "jsonl"): ["data.path=somewhere"],
}
"""What the user must give beside a member, because no default could be right."""


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return str(caught.value)


def to_lists(value: object) -> object:
    return [to_lists(item) for item in value] if isinstance(value, tuple) else value


class TestShippedFiles:
    """Every file of ``conf/`` composes, passes all checks, and is reachable by its group."""

    @pytest.mark.parametrize(("group", "member"), MEMBERS)
    def test_member_composes(self, group: str, member: str) -> None:
        config = compose([f"{group}={member}", *NEEDED.get((group, member), [])])
        assert isinstance(config, Config)
        if group == "experiment":
            return
        written = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{member}.yaml"))
        assert isinstance(written, dict)
        chosen = getattr(config, group)
        for key, value in written.items():
            got = getattr(chosen, str(key))
            assert to_lists(got) == value, f"{group}={member}: {group}.{key!r} is {got!r}, the file says {value!r}"

    def test_no_file_is_out_of_reach(self) -> None:
        files = {path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml")}
        reachable = {f"{group}/{member}" for group, member in MEMBERS} | {"config"}
        assert files == reachable, f"files {files - reachable} have no group, members {reachable - files} no file"

    def test_groups_are_sections(self) -> None:
        sections = set(valid_keys(Config)) | {"experiment"}
        assert set(GROUPS) <= sections, f"groups {set(GROUPS) - sections} set nothing"

    def test_experiment_wins_over_groups_and_the_command_line_over_it(self) -> None:
        config = compose(["experiment=mtp_depths", "train.steps=7"])
        got = (config.mtp.depth, config.train.steps, config.run_name)
        assert got == (2, 7, "mtp-depths"), f"depth, steps and name are {got}, expected (2, 7, 'mtp-depths')"

    def test_files_of_ones_own(self, tmp_path: Path) -> None:
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain: {steps: 77}\n")
        steps = compose([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]).train.steps
        assert steps == 77, f"train.steps is {steps}, the file says 77"

    def test_default_run(self) -> None:
        config = compose([])
        got = (config.model.name, config.data.name, config.parallel.pp, config.run_dir)
        assert got == ("tiny", "shakespeare", 2, "runs/tiny-shakespeare"), f"the default run is {got}"


class TestOverrides:
    """An override sets what it names and nothing else; one that cannot be meant is refused with the nearest key."""

    def test_numbers(self) -> None:
        config = compose(["train.steps=1e3", "optim.lr=1e-3", "mtp.loss_weight_steps=[[1000,0.1]]"])
        got = (config.train.steps, config.optim.lr, config.mtp.loss_weight_steps)
        assert got == (1000, 1e-3, ((1000.0, 0.1),)), f"got {got}"

    def test_deepspeed_keys_need_no_plus(self) -> None:
        given = ["ds.zero_optimization.reduce_scatter=false", "+ds.comms_logger.enabled=true", "ds.steps_per_print=5"]
        ds = compose(given).ds
        expected = {
            "zero_optimization": {"reduce_scatter": False},
            "comms_logger": {"enabled": True},
            "steps_per_print": 5,
        }
        assert ds == expected, f"got {ds}, expected {expected}"

    @pytest.mark.parametrize("spelling", ["2,3,3,2", "'2,3,3,2'"])
    def test_layout_may_be_written_bare(self, spelling: str) -> None:
        layout = compose([f"pipeline.layout={spelling}"]).pipeline.layout
        assert layout == "2,3,3,2", f"pipeline.layout={spelling} became {layout!r}"

    @pytest.mark.parametrize("layout", ["Et*3|(tt|)*29,m|L", "(Et|)*1t L", "EttL"])
    @pytest.mark.parametrize("quote", ["", "'"])
    def test_layout_string_needs_no_quotes_but_the_shells(self, layout: str, quote: str) -> None:
        found = compose([f"pipeline.layout={quote}{layout}{quote}"]).pipeline.layout
        assert found == layout, f"{layout} became {found!r}"

    def test_section_as_a_mapping(self) -> None:
        config = compose(["train={steps: 3, seq_len: 32}"])
        got = (config.train.steps, config.train.seq_len, config.train.micro_batches)
        assert got == (3, 32, Config().train.micro_batches), f"steps, seq_len and micro_batches are {got}"

    @pytest.mark.parametrize(
        ("override", "parts"),
        [
            ("train.setps=3", ["train.setps", "did you mean 'train.steps'?"]),
            ("steps=3", ["unknown key 'steps'", "did you mean 'train.steps'?"]),
            ("+train.setps=3", ["train.setps", "did you mean 'train.steps'?"]),
            ("++train.setps=3", ["train.setps", "did you mean 'train.steps'?"]),
            ("train={setps: 3}", ["train.setps", "did you mean 'train.steps'?"]),
            ("train.steps=abc", ["train.steps", "whole number", "'abc'"]),
            ("train.steps=2.5", ["train.steps", "whole number", "2.5"]),
            ("train.steps=???", ["train.steps", "whole number"]),
            ("train.steps", ["'train.steps'", "KEY=VALUE"]),
            ("--steps=3", ["--steps", "unknown key"]),
            ("model=tinny", ["model=tinny", "deepseek_v3", "did you mean 'tiny'?"]),
            ("experiment=nothing", ["experiment=nothing", "mtp_depths"]),
            ("train=fast", ["train=fast", "section", "train.steps"]),
            ("optim.lr=1e-3,3e-4", ["optim.lr=1e-3,3e-4", "--multirun"]),
            ("optim.lr=[", ["["]),
            ("~model", ["~model", "no key can be absent"]),
            ("~model.hidden_size", ["model.hidden_size", "no key can be absent"]),
            ("run.name=${nope}", ["nope", "run.name"]),
            ("run.name=../x", ["run.name", "'../x'", "run.dir"]),
            ("ds.optimizer.type=Adam", ["ds.optimizer", "optim.*"]),
            ("ds.zero_optimization.stage=3", ["ds.zero_optimization.stage", "stage 1"]),
            ("ds={train_batch_size: 8}", ["ds.train_batch_size", "train.micro_batches"]),
        ],
    )
    def test_refused(self, override: str, parts: list[str]) -> None:
        text = refusal(override)
        missing = [part for part in parts if part not in text]
        assert not missing, f"{text!r} lacks {missing}"


class TestNoCode:
    """A configuration names things; nothing in it is ever imported or called."""

    @pytest.mark.parametrize(
        "override",
        [
            "model._target_=os.system",
            "+model._target_=os.system",
            "ds._target_=os.system",
            "ds.a={b: {_target_: os.system}}",
            "ds.a=[{_target_: os.system}]",
            "hydra.callbacks={x: {_target_: os.system}}",
            "+hydra.callbacks.x._target_=os.system",
            "optim={_target_: os.system}",
        ],
    )
    def test_target_is_refused(self, override: str) -> None:
        text = refusal(override)
        assert "_target_" in text, f"{text!r} does not name _target_"

    def test_target_in_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "mine.yaml").write_text(
            "# @package _global_\nds: {monitor: [{_target_: os.system}]}\n"
        )
        text = refusal(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
        assert "ds.monitor.0._target_" in text, f"{text!r} does not name ds.monitor.0._target_"


class TestLightness:
    """Composing and checking imports neither torch nor DeepSpeed, so that a typo costs a second and not ten."""

    def test_no_torch(self) -> None:
        script = (
            "import sys\n"
            "from dist_mtp.cli import train\n"
            "from dist_mtp.config import resolve\n"
            "config = resolve(train.compose(['model=small']), vocab_size=257)\n"
            "train.make_plan(config)\n"
            "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'deepspeed', 'matplotlib'}))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "[]", f"imported {done.stdout.strip()}, expected []\n{done.stderr}"
