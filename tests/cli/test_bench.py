"""``dist-mtp bench``: what is measured, what is written, and what is left alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from dist_mtp.bench import precision, timing
from dist_mtp.bench.layers import Shape, layer_shapes, random_operands
from dist_mtp.bench.products import PRODUCTS, Fp8Products, plain_steps
from dist_mtp.bench.timing import interleaved_medians
from dist_mtp.cli.compose import compose
from dist_mtp.cli.main import main
from dist_mtp.config import Config, resolve
from dist_mtp.linear_names import linear_names
from dist_mtp.precision.fp8.emulated import EmulatedBackend
from dist_mtp.recompute import RECOMPUTE_LEVELS
from dist_mtp.run_folder import prepare_run_folder

CPU = torch.device("cpu")


def tiny(*overrides: str) -> Config:
    return resolve(compose(["model=tiny", *overrides]), vocab_size=257)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "write the name of a benchmark after dist-mtp bench:\n  precision  "),
        (["model=tiny"], "write the name of a benchmark after dist-mtp bench:\n  precision  "),
        (
            ["precison", "model=tiny"],
            "unknown benchmark 'precison' (did you mean 'precision'?); there are:\n  precision  ",
        ),
    ],
)
def test_unknown_benchmark(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = main(["bench", *arguments]), capsys.readouterr().err
    assert code == 2, f"exit code {code}: {error}"
    assert message in error, f"{error!r} lacks {message!r}"


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the folder of a run everything stays as it was; errors are those of the formats, and of no kernel beside."""
    monkeypatch.setitem(precision._LIMITS, "cpu", dataclasses.replace(precision._LIMITS["cpu"], budget_s=0.1))
    folder = tmp_path / "run"
    config = tiny(f"run.dir={folder}", "device=cpu")
    prepare_run_folder(config)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(["bench", "precision", "model=tiny", f"run.dir={folder}", "device=cpu"]) == 0
    output = capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert sorted(path.name for path in (folder / "bench").iterdir()) == ["precision.json", "precision.png"]
    found = json.loads((folder / "bench" / "precision.json").read_text())
    assert len(found["layers"]) == len(layer_shapes(config))
    assert set(found["unusable"]) <= {"fp8_torch", "fp8_deep_gemm"}, found["unusable"]
    for layer in found["layers"]:
        assert ", ".join(layer["shape"]["names"]) in output, f"{layer['shape']} is not printed"
        for product in PRODUCTS:
            errors = {name: result["errors"][product] for name, result in layer["formats"].items()}
            rounding = layer["formats"]["fp8_emulated"]["rounding"][product]
            assert errors["fp32"] < 1e-6, f"{layer['shape']}, {product}: {errors}"
            assert 1e-3 < errors["bf16"] < 3e-3, f"{layer['shape']}, {product}: {errors}"
            assert errors["fp8_emulated"] == pytest.approx(rounding, rel=0.25), f"{layer['shape']}, {product}: {errors}"
    assert found["saved_bytes"]["dense feed-forward"]["fp8"] < 0.5 * found["saved_bytes"]["dense feed-forward"]["bf16"]


def test_folder_without_a_run_stays_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``bench`` leaves there must not look like a run to a later ``train``, whatever its settings."""
    monkeypatch.setitem(precision._LIMITS, "cpu", precision.Limits(128, 1e6, 1e5, 0.0))
    assert main(["bench", "precision", "model=tiny", "mtp=off", f"run.dir={tmp_path}", "device=cpu"]) == 0
    prepare_run_folder(tiny(f"run.dir={tmp_path}", "train.seq_len=64"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "bench", "config.yaml"]


def test_shapes_are_those_of_all_layers() -> None:
    """Each layer's name once, with the experts of one rank."""
    config = tiny("parallel.dp=2", "parallel.ep=2")
    expected = {name.split(".", 3)[3].removeprefix("self_attn.").removeprefix("mlp.") for name in linear_names(config)}
    shapes = layer_shapes(config)
    found = [name.replace("experts.gate_up_proj", "experts") for shape in shapes for name in shape.names]
    assert sorted(found) == sorted([*expected, "experts.down_proj"]), f"{found} != {expected}"
    experts = {shape.names: (shape.num_experts, shape.out_features, shape.in_features) for shape in shapes}
    assert experts["experts.gate_up_proj",] == (4, 192, 128), experts
    assert ("gate_proj", "up_proj") in experts, "layers of one shape are not together"


@pytest.mark.parametrize("num_experts", [0, 3])
def test_products_are_those_of_the_layers(num_experts: int) -> None:
    """All formats compute the same three products; FP8 has its two quantisations as steps of their own."""
    operands = random_operands(Shape(("a",), 40, 24, num_experts), 300, seed=3, device=CPU)
    exact = plain_steps(operands, torch.float64)
    fp8 = Fp8Products(operands, EmulatedBackend(), power_of_two=True).steps
    assert set(fp8) - set(exact) == {"quantize_input", "quantize_grad"}
    x, grad, weight = (t.double() for t in (operands.x, operands.grad, operands.weight))
    if operands.ends is not None:
        expert_N = torch.bucketize(torch.arange(300), operands.ends, right=True)
        forward = torch.einsum("ni,noi->no", x, weight[expert_N])
        input_grad = torch.einsum("no,noi->ni", grad, weight[expert_N])
        chosen = torch.nn.functional.one_hot(expert_N, 3).double()
        weight_grad = torch.einsum("ne,no,ni->eoi", chosen, grad, x)
    else:
        forward, input_grad, weight_grad = x @ weight.t(), grad @ weight, grad.t() @ x
    for product, expected in zip(PRODUCTS, (forward, input_grad, weight_grad), strict=True):
        torch.testing.assert_close(exact[product](), expected)
        torch.testing.assert_close(
            fp8[product]().double(), expected, rtol=0, atol=0.1 * float(expected.abs().max()), msg=product
        )


def test_repetitions_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is A, then B; warm-up does not count, and the median of what counts is returned."""
    calls: list[str] = []
    lengths = {"a": iter([100.0, 5.0, 1.0, 3.0]), "b": iter([100.0, 2.0, 2.0, 9.0])}

    def elapsed(function: object, device: torch.device) -> float:
        assert callable(function)
        return next(lengths[function()])

    monkeypatch.setattr(timing, "elapsed_seconds", elapsed)
    cases = {name: lambda name=name: (calls.append(name), name)[1] for name in "ab"}
    found = interleaved_medians(cases, CPU, budget_s=0.0, warm_up=1)
    assert "".join(calls) == "ab" * 4, calls
    assert found == {"a": 3.0, "b": 2.0}, found


def test_recompute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has every level, and the file its numbers."""
    arguments = ["model=tiny", "model.v_head_dim=48", "train.seq_len=32", f"run.dir={tmp_path}", "device=cpu"]
    assert main(["bench", "recompute", *arguments]) == 0
    output = capsys.readouterr().out
    found = json.loads((tmp_path / "bench" / "recompute.json").read_text())
    for half, levels in found["kept"].items():
        assert list(levels) == [str(level) for level in RECOMPUTE_LEVELS]
        for level, kept in levels.items():
            assert f"{kept['measured']:,.0f} ({kept['planned']:,.0f})" in output, f"{half}, {level}: {output}"
