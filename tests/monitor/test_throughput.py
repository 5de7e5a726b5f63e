"""Speed numbers follow from a step's time by plain arithmetic."""

import pytest
import torch

from dist_mtp.monitor.throughput import Throughput, cpu_peak_flops, cuda_peak_flops


def test_throughput_of_a_known_step():
    """1,000 tokens of 6 GFLOP in 2 s on 3 devices are 1 TFLOP/s each, a quarter of a peak of 4."""
    throughput = Throughput(flops_per_token=6e9, tokens_per_step=1000, peak_flops_per_s=4e12, num_devices=3)
    result = throughput.metrics(2.0)
    expected = {"tokens_per_s": 500.0, "tflops_per_device": 1.0, "mfu": 0.25}
    assert result == pytest.approx(expected), f"{result}, expected {expected}"


def test_unknown_peak_leaves_mfu_out():
    """A made-up denominator would be worse than no number."""
    result = Throughput(flops_per_token=1.0, tokens_per_step=1, peak_flops_per_s=None, num_devices=1).metrics(1.0)
    assert "mfu" not in result, result


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_cuda_peak_by_device_name(name, peak):
    """The slower H100 variants must not be taken for the SXM one, which would understate their MFU."""
    assert cuda_peak_flops(name) == peak, f"{name}: {cuda_peak_flops(name)}, expected {peak}"


def test_measuring_the_cpu_leaves_no_trace():
    """The measurement restores the thread count and draws nothing from the generator that initialises weights."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    peak = cpu_peak_flops(threads + 1, seconds=0.02)
    assert torch.get_num_threads() == threads, f"{torch.get_num_threads()} threads, {threads} before"
    assert torch.equal(torch.get_rng_state(), state), "the global random state moved"
    assert 1e8 < peak < 1e14, f"{peak:.3g} FLOP/s is no CPU"
