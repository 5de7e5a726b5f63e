"""The plan as its readers see it: plan.json, the bounds, the command and the picture."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline.pipeline_cases import tiny_config, v3_config

from dist_mtp.cli import gpus
from dist_mtp.cli import plan as plan_command
from dist_mtp.config import Config, RunConfig
from dist_mtp.config_checks import LAST_SCHEDULES, V_SCHEDULES, check
from dist_mtp.monitor.plots import plot_plan
from dist_mtp.pipeline.costs import list_units, num_parameters
from dist_mtp.pipeline.plan import Plan, make_plan

EVERY_SCHEDULE = [("v", name) for name in V_SCHEDULES] + [("last", name) for name in LAST_SCHEDULES]


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    """Tiny models under every schedule and P, and DeepSeek-V3 under two."""
    configs = [
        tiny_config(pp, micro_batches=8, depth=depth, placement=placement, schedule=schedule)
        for placement, schedule in EVERY_SCHEDULE
        for pp in (1, 2, 4)
        for depth in (0, 2)
    ]
    configs += [v3_config(placement="v", schedule="dualpipev"), v3_config(placement="last", schedule="1f1b")]
    for config in configs:
        check(config)
    return [make_plan(config) for config in configs]


class TestJson:
    """``plan.json`` has exactly the documented fields, and they agree with each other."""

    def test_fields(self, plans: list[Plan]) -> None:
        for plan in plans:
            content = plan.to_json()
            assert json.loads(json.dumps(content)) == content, "not plain JSON"
            assert list(content) == [
                *(
                    "pp",
                    "dp",
                    "ep",
                    "placement",
                    "schedule",
                    "origin",
                    "recompute",
                    "micro_batches",
                    "stages",
                    "predicted",
                ),
                *("bound", "experts", "ranks", "edges", "memory_limit", "warnings", "nodes"),
            ]
            assert {tuple(stage) for stage in content["stages"]} == {
                ("index", "rank", "units", "time_f", "time_i", "time_w", "params")
            }
            assert list(content["predicted"]) == ["step_time", "bubble", "peak_activation_bytes", "busy"]
            assert list(content["bound"]) == ["balance", "ramp"]
            assert content["experts"] is None, "nothing is shared with ep=1"
            assert [rank["rank"] for rank in content["ranks"]] == list(range(plan.pp))
            assert {tuple(rank) for rank in content["ranks"]} == {
                (
                    *("rank", "dense_params", "expert_params"),
                    *("weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes"),
                )
            }

    def test_fields_with_expert_parallelism(self) -> None:
        """Two pipeline ranks of four data ranks, two of which share the 8 experts of a layer."""
        config = tiny_config(2)
        plan = make_plan(dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, dp=4, ep=2)))
        content = plan.to_json()
        assert json.loads(json.dumps(content)) == content, "not plain JSON"
        sent = [8 * sum(s.cost.all_to_all_bytes for s in plan.stages_of(rank)) for rank in range(2)]
        assert content["experts"] == {
            "per_rank": 4,
            "copies": 2,
            "groups": [[0, 1], [2, 3]],
            "within_node": True,
            "all_to_all_bytes_per_step": sent,
        }
        # 4 rows of 128 tokens, K = 2, H = 128, fp32, half of it to the other rank; 3 layers of the trunk and one of MTP.
        assert sum(sent) == 8 * 4 * (3 + 1) * (4 * 128 * 2 * 128 * 4 // 2), sent

    def test_bubble_follows_from_the_times(self, plans: list[Plan]) -> None:
        """``bubble = 1 - busy / (ranks * step time)``, as documented."""
        for plan in plans:
            content = plan.to_json()
            busy = plan.micro_batches * sum(s["time_f"] + s["time_i"] + s["time_w"] for s in content["stages"])
            expected = 1 - busy / (plan.pp * content["predicted"]["step_time"])
            assert content["predicted"]["bubble"] == pytest.approx(expected, abs=1e-9)
            assert len(content["predicted"]["peak_activation_bytes"]) == plan.pp

    def test_units_and_parameters_add_up(self) -> None:
        """Every unit stands in one stage; parameters sum up to the model's, plus the embedding's replica if any."""
        for placement, schedule in EVERY_SCHEDULE:
            for pp, depth in ((1, 1), (2, 0), (2, 1), (4, 1)):
                config = tiny_config(pp, depth=depth, placement=placement, schedule=schedule)
                plan = make_plan(config)
                names = [name for stage in plan.stages for name in stage.unit_names]
                assert names == [unit.name for unit in list_units(config)], f"{schedule}, P={pp}: {names}"
                replica = 257 * config.model.hidden_size if placement == "last" and pp > 1 and depth > 0 else 0
                total = sum(stage.cost.params for stage in plan.stages)
                assert total == num_parameters(config) + replica, f"{schedule}, P={pp}, D={depth}: {total}"

    def test_tied_head_on_another_rank_has_a_replica(self) -> None:
        """Without MTP the last rank of ``last`` placement still needs the embedding if it is the head as well."""
        config = tiny_config(2, depth=0, placement="last", schedule="1f1b")
        untied = make_plan(config).stages[-1].cost.params
        tied_config = dataclasses.replace(config, model=dataclasses.replace(config.model, tie_word_embeddings=True))
        tied = make_plan(tied_config).stages[-1].cost.params
        assert tied == untied, f"{tied} != {untied}: a replica in place of the head"


class TestBounds:
    """No plan is better than its own bounds."""

    def test_efficiency_never_exceeds_them(self, plans: list[Plan]) -> None:
        for plan in plans:
            efficiency, limit = 1 - plan.timeline.bubble, plan.bound.balance * plan.bound.ramp
            assert efficiency <= limit + 1e-9, f"{plan.schedule}, P={plan.pp}: {efficiency} > {limit}"
            assert 0 < limit <= 1

    def test_one_rank_loses_nothing(self, plans: list[Plan]) -> None:
        for plan in plans:
            if plan.pp == 1:
                assert (plan.bound.balance, plan.bound.ramp) == (1, pytest.approx(1))
                assert plan.timeline.bubble == pytest.approx(0)

    def test_head_caps_large_pipelines(self) -> None:
        """DeepSeek-V3, P=16: the head takes 1.385 of an average layer, each depth 2.54 more."""
        bounds = [
            make_plan(v3_config(depth=depth, pp=16, layout="uniform", schedule="zbv", memory_gb=1e4)).bound.balance
            for depth in (0, 1, 2, 3)
        ]
        assert bounds == pytest.approx([1.0, 1.0, 0.652, 0.486], abs=0.005), bounds
        plan = make_plan(v3_config(depth=2, pp=16, layout="uniform", schedule="zbv", memory_gb=1e4))
        assert plan.balanced_ranks == 10, plan.balanced_ranks

    def test_1f1b_ramp_is_the_textbooks(self) -> None:
        """Near-equal stages: M / (M + P - 1), to the few percent that stages differ and messages take."""
        plan = make_plan(v3_config(depth=0, pp=4, micro_batches=16, placement="last", schedule="1f1b"))
        assert plan.bound.ramp == pytest.approx(16 / 19, abs=0.02), plan.bound.ramp


def test_auto_layout_beats_uniform() -> None:
    """DeepSeek-V3 with D=1 on P=8: 7 % bubble against 24 % for equal unit counts (and 21 % for balanced 1F1B)."""
    auto = make_plan(v3_config(schedule="dualpipev", memory_gb=1e4)).timeline
    uniform = make_plan(v3_config(schedule="dualpipev", layout="uniform", memory_gb=1e4)).timeline
    assert auto.bubble < 0.07 < 0.2 < uniform.bubble, f"{auto.bubble} and {uniform.bubble}"


def test_v_keeps_both_ends_on_rank_0() -> None:
    """Embedding, head and MTP modules belong to one rank, under every layout."""
    for layout in ("auto", "uniform", "1,2,4,3"):
        plan = make_plan(tiny_config(2, layout=layout))
        names = [name for stage in plan.stages_of(0) for name in stage.unit_names]
        assert {"embed", "head"} <= set(names), f"{layout}: rank 0 holds {names}"


def test_forward_only_table_for_any_number_of_microbatches() -> None:
    plan = make_plan(tiny_config(2))
    table = plan.forward_only(3)
    forwards = [str(action) for actions in table for action in actions if action.kind.value == "F"]
    assert len(forwards) == 3 * plan.num_stages, forwards


def test_planning_never_imports_torch() -> None:
    """The command line plans without torch, and so without its seconds of start-up."""
    program = (
        "import sys, dist_mtp.pipeline.plan, dist_mtp.cli.plan; "
        "print([name for name in ('torch', 'deepspeed', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stdout + done.stderr


class TestCommand:
    """``dist-mtp plan`` prints the plan and leaves plan.json and plan.png in the run folder."""

    def test_writes_and_prints(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config: Config = dataclasses.replace(tiny_config(2), run=RunConfig(dir=str(tmp_path / "new" / "run")))
        assert plan_command.run(config) == 0
        folder = tmp_path / "new" / "run"
        assert json.loads((folder / "plan.json").read_text()) == make_plan(config).to_json()
        assert (folder / "plan.png").stat().st_size > 10_000
        printed = capsys.readouterr().out
        assert "embed" in printed
        assert "predicted step" in printed
        assert str(folder / "plan.json") in printed

    def test_leaves_the_files_of_a_run_alone(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config: Config = dataclasses.replace(tiny_config(2), run=RunConfig(dir=str(tmp_path)))
        for name in ("config.yaml", "plan.json", "plan.png"):
            (tmp_path / name).write_text("the run's")
        assert plan_command.run(config) == 0
        kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
        assert kept == dict.fromkeys(("config.yaml", "plan.json", "plan.png"), "the run's"), f"found {kept}"
        printed = capsys.readouterr().out
        for part in ("predicted step", "not written", str(tmp_path), "run.name"):
            assert part in printed, f"{part!r} is missing in:\n{printed}"

    def test_plans_for_the_gpus_of_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(gpus, "visible_gpus", lambda: ["NVIDIA H200"] * 2)
        config: Config = dataclasses.replace(tiny_config(2), run=RunConfig(dir=str(tmp_path)))
        assert plan_command.run(config) == 0
        assert json.loads((tmp_path / "plan.json").read_text()) == make_plan(config, "NVIDIA H200").to_json()
        assert "device profile h200" in capsys.readouterr().out

    def test_says_where_experts_live(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """DeepSeek-V3 in its own layout: 64 ranks of 8 nodes share the experts, and 128 hold a stage."""
        arguments = ["model=deepseek_v3", "mtp=d1", "precision=bf16", f"run.dir={tmp_path / 'run'}"]
        arguments += ["parallel.pp=16", "parallel.dp=128", "parallel.ep=64", "train.micro_batches=32"]
        arguments += ["train.micro_batch_size=1", "train.seq_len=4096", "pipeline.device_profile=h800"]
        arguments += ["pipeline.schedule=zbv"]
        assert plan_command.main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        for expected in (
            "256 per MoE layer, 4 per rank: 0-3 on data rank 0, 4-7 on data rank 1, .., 252-255 on data rank 63",
            "data ranks 0-63, 64-127 of each pipeline rank; copies of each expert: 2",
            "sent per rank and step if experts are balanced, between nodes",
        ):
            assert any(expected in line for line in lines), f"{expected!r} is missing in:\n" + "\n".join(lines)
        first = lines.index(next(line for line in lines if "expert params" in line))
        ranks = [line.split() for line in lines[first + 1 : first + 17]]
        assert [row[0] for row in ranks] == [str(rank) for rank in range(16)], ranks
        assert {len(row) for row in ranks} == {10}, ranks
        assert max(len(line) for line in lines if str(tmp_path) not in line) <= 120, lines

    def test_says_nothing_of_experts_that_nobody_shares(self) -> None:
        text = plan_command.summary(make_plan(tiny_config(2)))
        assert "all-to-all" not in text, text
        assert "expert groups" not in text, text

    def test_warns_when_the_head_is_too_slow(self) -> None:
        text = plan_command.summary(
            make_plan(v3_config(depth=2, pp=16, layout="uniform", schedule="zbv", memory_gb=1e4))
        )
        assert "parallel.pp=10 with more data" in text, text
        assert "warning" not in plan_command.summary(make_plan(v3_config(depth=0, pp=4, schedule="zbv", memory_gb=1e4)))


@pytest.mark.parametrize(("placement", "schedule"), EVERY_SCHEDULE)
def test_picture_of_every_schedule(placement: str, schedule: str, tmp_path: Path) -> None:
    """A PNG at least 1,000 pixels wide, higher with more ranks."""
    heights = []
    for pp in (2, 4):
        path = tmp_path / f"{pp}.png"
        plot_plan(make_plan(tiny_config(pp, placement=placement, schedule=schedule)), path)
        header = path.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n", header
        width, height = struct.unpack(">II", header[16:24])
        assert width >= 1000, width
        heights.append(height)
    assert heights[0] < heights[1], heights
