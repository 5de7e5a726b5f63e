"""Small matrices: more than one thread only adds scheduling, and changes the order of sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.fp8_cases import require_triton
from support.ranks import run_ranks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What the Triton kernels and the backends on top of them give on the CPU, by case; a string is a traceback."""
    require_triton()
    folder = tmp_path_factory.mktemp("interpreted")
    run_ranks("support.interpreted_kernels:run_all", 1, folder, timeout_s=300)
    return torch.load(folder / "results.pt", weights_only=False)
