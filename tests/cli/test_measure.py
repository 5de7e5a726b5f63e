"""``dist-mtp plan measure=true``: what is timed, what is written, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_mtp.bench import unit_times
from dist_mtp.bench.unit_times import UnitRun, check_memory, measure_unit_times, representatives
from dist_mtp.cli import measure as measure_command
from dist_mtp.cli.compose import compose
from dist_mtp.cli.main import main
from dist_mtp.config import Config, resolve
from dist_mtp.errors import ConfigError
from dist_mtp.model.transformer import EMBED, HEAD
from dist_mtp.pipeline.plan import make_plan
from dist_mtp.pipeline.unit_times import KINDS
from dist_mtp.precision.weight_grads import DeferrableLayer

CPU = torch.device("cpu")


def tiny(*overrides: str) -> Config:
    return resolve(compose(["model=tiny", "device=cpu", *overrides]), vocab_size=257)


class TestUnitRun:
    """What is timed is a stage of one unit: I leaves linear weights to W, and both leave gradients where training does."""

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
    def test_every_weight_gets_its_gradient_in_its_part(self, precision: str) -> None:
        config = tiny(f"precision={precision}", "train.micro_batch_size=1", "train.seq_len=32")
        batch = unit_times._random_batch(config, CPU)
        for kind, unit in representatives(config).items():
            run = UnitRun(config, unit, batch, CPU)
            model = run._stage.model
            withheld = {
                name
                for path, layer in model.named_modules()
                if isinstance(layer, DeferrableLayer)
                and path != "lm_head"  # whose gradient the loss takes in its forward
                for name, _ in layer.named_parameters(prefix=path, recurse=False)
            }
            run.forward()
            run.input_gradient()
            after_i = with_gradient(model)
            run.weight_gradient()
            after_w = with_gradient(model)
            every = {name for name, _ in model.named_parameters()}
            assert after_w == every, f"{kind}: {every - after_w} got no gradient"
            assert after_i == every - withheld, f"{kind}: after I {after_i ^ (every - withheld)} is wrong"
            assert bool(withheld) == (unit != EMBED), f"{kind} defers {withheld}"
            assert model.holds_replica == (unit == HEAD)

    def test_experts_of_one_rank_compute_its_share(self) -> None:
        """With ep=2 half of the experts are here, and as many rows as tokens choose."""
        config = tiny("parallel.dp=2", "parallel.ep=2")
        run = UnitRun(config, representatives(config)["moe_ffn"], unit_times._random_batch(config, CPU), CPU)
        run.forward()
        run.input_gradient()
        (experts,) = (m for m in run._stage.model.modules() if type(m).__name__ == "Experts")
        processed: Any = experts.processed
        assert (len(processed), int(processed.sum())) == (4, 4 * 128 * 2), processed


def with_gradient(model: torch.nn.Module) -> set[str]:
    def gradient(parameter: Any) -> Tensor | None:
        found: Tensor | None = getattr(parameter, "main_grad", parameter.grad)
        return found

    return {
        name
        for name, parameter in model.named_parameters()
        if (found := gradient(parameter)) is not None and bool(found.any())
    }


class TestMeasure:
    """Every kind once, F before I before W, and nothing on a device that is too small."""

    def test_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def once(
            cases: Mapping[tuple[str, str], Callable[[], object]], device: torch.device, **settings: Any
        ) -> dict[tuple[str, str], float]:
            for function in cases.values():
                function()
            return {case: float(place) for place, case in enumerate(cases)}

        monkeypatch.setattr(unit_times, "interleaved_medians", once)
        times = measure_unit_times(tiny("train.micro_batch_size=1", "train.seq_len=16"), CPU)
        assert set(times.seconds) == set(KINDS)
        for kind, (f, i, w) in times.seconds.items():
            assert (i, w) == (f + 1, f + 2), f"{kind}: F, I and W ran as numbers {f}, {i} and {w}"
        assert times.measured_with["train.seq_len"] == 16

    def test_memory(self) -> None:
        v3 = resolve(compose(["model=deepseek_v3", "precision=bf16"]), vocab_size=257)
        with pytest.raises(ConfigError) as caught:
            check_memory(v3, CPU, free_bytes=16e9)
        for part in ("model=deepseek_v3", "16.0GB of memory free", "them head", "parallel.ep"):
            assert part in str(caught.value), f"{caught.value} lacks {part!r}"
        check_memory(tiny(), CPU, free_bytes=1e9)


class TestCommand:
    """It prints measured beside estimated times, writes what ``train`` takes, and plans as ``train`` will."""

    def test_writes_what_train_takes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(unit_times, "BUDGET_S", 0.0)
        monkeypatch.setattr(unit_times, "_WARM_UP", 0)
        overrides = ["device=cpu", "train.micro_batch_size=1", "train.seq_len=32", f"run.dir={tmp_path}"]
        assert main(["plan", "measure=true", *overrides]) == 0
        printed = capsys.readouterr().out
        file = tmp_path / measure_command.UNIT_TIMES
        taken = compose([*overrides, f"pipeline.unit_times_file={file}"])
        content = json.loads(file.read_text())
        assert taken.pipeline.unit_times == {kind: tuple(times.values()) for kind, times in content["units"].items()}
        assert json.loads((tmp_path / "plan.json").read_text()) == make_plan(resolve(taken, vocab_size=257)).to_json()
        for part in (*KINDS, "analytic", "ratio", f"pipeline.unit_times_file={file}", "predicted step"):
            assert part in printed, f"{part!r} is missing in:\n{printed}"
        # Measuring anew does not need the file that it replaces.
        file.write_text("damaged")
        assert main(["plan", "measure=true", *overrides, f"pipeline.unit_times_file={file}"]) == 0

    def test_bad_value(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", "measure=maybe"]) == 2
        assert "'measure=maybe' is not measure=true or measure=false" in capsys.readouterr().err

    def test_gpu_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["plan", "measure=true", "device=cuda"]) == 2
        assert "device=cuda needs a GPU to measure" in capsys.readouterr().err
