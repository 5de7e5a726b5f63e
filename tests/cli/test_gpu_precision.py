"""``benchmarks/gpu_precision.py`` without a GPU: that it runs, and that what it would measure on one is what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_mtp.bench.layers import layer_shapes
from dist_mtp.bench.model_slice import FoldedDispatcher, ModelSlice
from dist_mtp.config import Config
from dist_mtp.model.dispatch import Routing
from dist_mtp.precision.fp8 import scaled_mm
from dist_mtp.precision.fp8.emulated import EmulatedBackend

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_precision", ROOT / "benchmarks" / "gpu_precision.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_smoke(benchmark: ModuleType, tmp_path: Path) -> None:
    """Every part runs, and the file has every number that the tables show."""
    assert benchmark.main(["--cpu-smoke", "--output", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    names = [name for layer in found["layers"] for name in layer["shape"]["names"]]
    twice = {name for name, count in Counter(names).items() if count > 1}
    assert twice == {"experts.gate_up_proj", "experts.down_proj"}, names
    for layer in found["layers"]:
        for result in layer["formats"].values():
            without, included = (result["flops_per_s"][f"{kind}_quantization"]["all"] for kind in ("without", "with"))
            assert 0 < included <= without, layer
        assert layer["formats"]["bf16"]["errors"]["forward"] < layer["formats"]["fp8"]["errors"]["forward"] < 0.05
    assert all(found["slice"][name][f"{p}_tokens_per_s"] > 0 for name in ("model", "layers") for p in ("bf16", "fp8"))


def test_without_a_gpu(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if not scaled_mm.problem(torch.device("cuda", 0)):
        pytest.skip("there is a GPU with FP8")
    assert benchmark.main([]) == 2
    assert "no GPU with FP8" in capsys.readouterr().err


def test_sizes_on_a_gpu(benchmark: ModuleType) -> None:
    """The matrices of DeepSeek-V3, with 4 and 32 experts; and a slice that fits into 80 GB."""
    setup = benchmark.GPU
    config = benchmark.config_of(*setup.overrides, "model.first_k_dense_replace=1")
    more = benchmark.config_of(*setup.overrides, setup.more_experts)
    found = {(s.num_experts, s.in_features, s.out_features) for c in (config, more) for s in layer_shapes(c)}
    expected = {(0, 7168, 1536), (0, 7168, 576), (0, 1536, 24576), (0, 512, 32768), (0, 16384, 7168)}
    expected |= {(0, 7168, 18432), (0, 18432, 7168), (0, 14336, 7168)}
    expected |= {(experts, *size) for experts in (4, 32) for size in ((7168, 4096), (2048, 7168))}
    assert expected <= found, f"{expected - found} are not measured"
    planned = benchmark.planned_bytes(benchmark.config_of(*setup.overrides))
    assert sum(planned.values()) < benchmark.USABLE_MEMORY * 79e9, f"{planned} do not fit, rows would be shortened"


class CountingBackend(EmulatedBackend):
    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def quantize_weight(self, weight: Tensor, *, power_of_two: bool) -> Any:
        self.calls["weights"] += 1
        return super().quantize_weight(weight, power_of_two=power_of_two)

    def product(self, *operands: Any) -> Tensor:
        self.calls["products"] += 1
        return super().product(*operands)


class TestSlice:
    """bf16 steps never touch FP8, and FP8 steps quantise every weight once, whatever the number of microbatches."""

    @pytest.fixture
    def config(self, benchmark: ModuleType) -> Config:
        found: Config = benchmark.config_of(*benchmark.CPU_SMOKE.overrides)
        return found

    def test_precisions(self, config: Config) -> None:
        backend = CountingBackend()
        part = ModelSlice(config, backend, CPU)
        part.step("bf16", 2, whole=True)
        assert not backend.calls, f"a bf16 step did {backend.calls} in FP8"
        # Two layers and the MTP module: five matrices of attention, three of shared and two of routed experts; eh_proj.
        weights = 3 * (5 + 3 + 2) + 1
        for step in (1, 2):
            part.step("fp8", 2, whole=True)
            assert backend.calls == {"weights": step * weights, "products": step * 2 * 2 * weights}, backend.calls

    def test_layers_alone(self, config: Config) -> None:
        backend = CountingBackend()
        ModelSlice(config, backend, CPU).step("fp8", 1, whole=False)
        assert backend.calls == {"weights": 20, "products": 40}, backend.calls


def test_folded_experts() -> None:
    """Of six experts two are here: even ones count as the first, odd ones as the second, and no choice is lost."""
    ids_TK = torch.tensor([[0, 3], [2, 4], [5, 1]])
    counts_E = ids_TK.flatten().bincount(minlength=6)
    routing = Routing(ids_TK, torch.ones(3, 2), counts_E)
    rows, ends = FoldedDispatcher(2).dispatch(torch.tensor([[0.0], [1.0], [2.0]]), routing).receive()
    assert (rows.flatten().tolist(), ends.tolist()) == ([0, 1, 1, 0, 2, 2], [3, 6]), f"{rows}, {ends}"
