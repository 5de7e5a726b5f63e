"""Measured times of units: the file, what it may be used for, and what plans make of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from pipeline.pipeline_cases import tiny_config

from dist_mtp.cli.compose import compose
from dist_mtp.config import Config, from_mapping, resolve, to_dict
from dist_mtp.errors import ConfigError
from dist_mtp.pipeline.costs import list_units, unit_costs
from dist_mtp.pipeline.devices import PROFILES
from dist_mtp.pipeline.plan import make_plan
from dist_mtp.pipeline.unit_times import KINDS, UnitTimes, decisive_settings, planned_costs
from dist_mtp.recompute import Recompute

SECONDS = {kind: (0.1 * place, 0.2 * place, 0.3 * place) for place, kind in enumerate(KINDS, start=1)}


def times_of(config: Config, **changed: Any) -> UnitTimes:
    settings = decisive_settings(config, "cpu") | changed
    return UnitTimes(SECONDS, device="a processor", device_type="cpu", torch="2", measured_with=settings)


def with_times(config: Config, seconds: dict[str, Any]) -> Config:
    return dataclasses.replace(config, pipeline=dataclasses.replace(config.pipeline, unit_times=seconds))


def write(times: UnitTimes, folder: Path) -> str:
    file = folder / "unit_times.json"
    file.write_text(json.dumps(times.to_json()))
    return str(file)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


class TestFile:
    """What was measured comes back to the bit; what was not measured, or cannot have been, is refused by name."""

    def test_round_trip(self) -> None:
        times = times_of(tiny_config())
        assert UnitTimes.from_json(json.loads(json.dumps(times.to_json()))) == times

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("units", "attention", "time_i"), -1e-3, "the input gradient of attention takes -0.001 seconds"),
            (("units", "head", "time_f"), math.inf, "the forward of head takes inf seconds"),
            (("units", "head", "time_w"), math.nan, "the weight gradient of head takes nan seconds"),
            (("units", "head", "time_w"), "1", "the weight gradient of head takes '1' seconds"),
            (("units", "head"), {"time_f": 1.0, "time_i": 1.0}, "KeyError('time_w')"),
            (("units", "head"), dict.fromkeys(("time_f", "time_i", "time_w"), 0), "head takes no time at all"),
            (("units", "mtp"), dict.fromkeys(("time_f", "time_i", "time_w"), 1), "times of 'mtp', which is none of"),
            (("units",), None, "not what dist-mtp plan measure=true writes"),
        ],
    )
    def test_damage(self, path: tuple[str, ...], value: Any, message: str) -> None:
        content = times_of(tiny_config()).to_json()
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        with pytest.raises(ConfigError) as caught:
            UnitTimes.from_json(content)
        assert message in str(caught.value), f"{caught.value} lacks {message!r}"
        assert "dist-mtp plan measure=true" in str(caught.value), f"{caught.value} has no fix"


class TestConfiguration:
    """A configuration takes the file's numbers when it is composed, or refuses the file; nobody reads it again."""

    def test_numbers_travel_with_the_configuration(self, tmp_path: Path) -> None:
        file = write(times_of(tiny_config()), tmp_path)
        config = compose([f"pipeline.unit_times_file={file}", "parallel.pp=2"])
        Path(file).unlink()  # ranks may not see it
        on_rank = resolve(from_mapping(json.loads(json.dumps(to_dict(config)))), vocab_size=257, world_size=2)
        assert on_rank.pipeline.unit_times == SECONDS, on_rank.pipeline.unit_times

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("train.seq_len=64", "measured with train.seq_len=128, but this run has train.seq_len=64"),
            ("train.micro_batch_size=2", "train.micro_batch_size=4, but this run has train.micro_batch_size=2"),
            ("precision=bf16", "precision.name=fp32, but this run has precision.name=bf16"),
            ("mtp.depth=2", "mtp.depth=1, but this run has mtp.depth=2"),
            ("model.hidden_size=64", "model.hidden_size=128, but this run has model.hidden_size=64"),
            ("model.q_lora_rank=null", "model.q_lora_rank=64, but this run has model.q_lora_rank=null"),
            ("tokenizer=bpe", "model.vocab_size=257, but this run has model.vocab_size=4096"),
            ("launcher.threads_per_rank=2", "launcher.threads_per_rank=1, but this run has"),
            ("pipeline.recompute=full", "pipeline.recompute=none, but this run has pipeline.recompute=full"),
            ("device=cuda", "measured on a processor (cpu), but this run has device=cuda"),
        ],
    )
    def test_other_settings(self, tmp_path: Path, override: str, message: str) -> None:
        file = write(times_of(tiny_config()), tmp_path)
        text = refusal(f"pipeline.unit_times_file={file}", override)
        for part in (f"pipeline.unit_times_file={file}: ", message, "`dist-mtp plan measure=true`"):
            assert part in text, f"{text!r} lacks {part!r}"

    def test_layers_and_layout_may_differ(self, tmp_path: Path) -> None:
        """A model of few layers can be measured for one of many."""
        file = write(times_of(tiny_config()), tmp_path)
        changed = ["model.num_layers=12", "parallel.pp=4", "train.micro_batches=16", "optim.lr=1e-4"]
        assert compose([f"pipeline.unit_times_file={file}", *changed]).pipeline.unit_times == SECONDS

    def test_unmeasured_kind(self, tmp_path: Path) -> None:
        times = times_of(tiny_config())
        seconds = {kind: value for kind, value in times.seconds.items() if kind != "dense_ffn"}
        file = write(dataclasses.replace(times, seconds=seconds), tmp_path)
        assert "no times of dense_ffn, which this model has" in refusal(f"pipeline.unit_times_file={file}")
        assert compose([f"pipeline.unit_times_file={file}", "model.first_k_dense_replace=0"]).pipeline.unit_times

    def test_unreadable(self, tmp_path: Path) -> None:
        file = tmp_path / "times.json"
        assert "cannot be read (No such file or directory)" in refusal(f"pipeline.unit_times_file={file}")
        file.write_text('{"units": ')
        assert "damaged" in refusal(f"pipeline.unit_times_file={file}")


class TestPlannedCosts:
    """Times are the measured ones, everything else is the formulas'."""

    def test_only_times_change(self) -> None:
        config = tiny_config()
        before, after = unit_costs(config, PROFILES["cpu"]), planned_costs(with_times(config, SECONDS), PROFILES["cpu"])
        assert planned_costs(config, PROFILES["cpu"]) == before, "without measured times nothing changes"
        for unit, old, new in zip(list_units(config), before, after, strict=True):
            assert (new.time_f, new.time_i, new.time_w) == SECONDS[unit.kind], unit
            same = dataclasses.replace(new, time_f=old.time_f, time_i=old.time_i, time_w=old.time_w)
            assert same == old, f"{unit.name}: {same} != {old}"

    def test_exchanges_are_added(self) -> None:
        """Of experts on two ranks: two all-to-alls in the forward and two in the input gradient, of MoE layers only."""
        config = tiny_config()
        config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, dp=2, ep=2))
        profile = PROFILES["cpu"]
        # 4 rows of 128 tokens, K = 2, H = 128, fp32, half of it to the other rank; towards experts and back.
        exchange = 2 * profile.all_to_all_seconds(4 * 128 * 2 * 128 * 4 // 2, 2, 4)
        for unit, cost in zip(list_units(config), planned_costs(with_times(config, SECONDS), profile), strict=True):
            extra = exchange if unit.kind in ("moe_ffn", "head") else 0.0
            f, i, w = SECONDS[unit.kind]
            assert (cost.time_f, cost.time_i, cost.time_w) == pytest.approx((f + extra, i + extra, w)), unit

    def test_recomputation_beyond_what_was_measured(self) -> None:
        """``auto`` measures without any; a plan that chooses it takes the measured forward once more in I."""
        config = tiny_config(recompute="auto")
        costs = planned_costs(with_times(config, SECONDS), PROFILES["cpu"], Recompute.parse("full"))
        for unit, cost in zip(list_units(config), costs, strict=True):
            f, i, w = SECONDS[unit.kind]
            assert (cost.time_f, cost.time_w) == (f, w), unit
            if unit.kind == "head":  # all but the loss
                assert i < cost.time_i < i + f, unit
            else:
                assert cost.time_i == pytest.approx(i if unit.kind == "embedding" else i + f), unit
        measured_so = with_times(tiny_config(recompute="full"), SECONDS)
        assert planned_costs(measured_so, PROFILES["cpu"])[1].time_i == SECONDS["attention"][1], "counted twice"

    def test_missing_kind(self) -> None:
        with pytest.raises(ConfigError, match=r"pipeline.unit_times: no times of dense_ffn, embedding, head, moe_ffn"):
            planned_costs(with_times(tiny_config(), {"attention": (1.0, 1.0, 1.0)}), PROFILES["cpu"])


class TestPlan:
    """Units that were measured to be slow get company from fewer others."""

    def test_slow_attention_has_the_fewest_neighbours(self) -> None:
        """In a model whose attention takes ten times as long as all else, stages differ by one in attention halves."""
        config = tiny_config(2, depth=0)
        even: dict[str, Any] = dict.fromkeys(KINDS, (1.0, 1.0, 1.0))
        slow = make_plan(with_times(config, even | {"attention": (10.0, 10.0, 10.0)}))
        held = [
            sum(name.endswith("attention") for stage in slow.stages_of(rank) for name in stage.unit_names)
            for rank in range(2)
        ]
        assert held == [2, 2], f"attention halves per rank: {held}"
        head = make_plan(with_times(config, even | {"head": (10.0, 10.0, 10.0)}))
        units = [sum(len(stage.units) for stage in head.stages_of(rank)) for rank in range(2)]
        assert units[0] < units[1], f"units per rank: {units}, though rank 0 has the slow head"

    def test_train_cuts_as_plan_did(self, tmp_path: Path) -> None:
        """At pp=2: ranks resolve what the launcher wrote, and get the plan that ``dist-mtp plan`` has shown."""
        planned = resolve(compose(["parallel.pp=2"]), vocab_size=257)
        measured = dataclasses.replace(times_of(planned), seconds=SECONDS | {"attention": (9.0, 9.0, 9.0)})
        shown = make_plan(with_times(planned, {**measured.seconds}))
        trained = compose([f"pipeline.unit_times_file={write(measured, tmp_path)}", "parallel.pp=2"])
        on_rank = resolve(from_mapping(to_dict(trained)), vocab_size=257, world_size=2)
        assert make_plan(on_rank).to_json() == shown.to_json()
        assert shown.to_json() != make_plan(planned).to_json(), "measured times changed nothing"
