"""Initial weights that depend on the seed and the logical name alone, so every layout starts from the same model.

On one kind of device: CPU and CUDA generators draw different numbers from one seed.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from dist_mtp.model.naming import logical_tensors


def tensor_seed(seed: int, name: str) -> int:
    """Seed of one logical tensor: 63 bits of SHA-256 over the run's seed and the name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def initialize(model: nn.Module, *, seed: int, std: float, first_expert: int = 0) -> None:
    """Fill every parameter in place: matrices from a normal distribution, norm weights with ones.

    Values are drawn in fp32 and then rounded, so that precisions start from the same numbers.

    Args:
        first_expert: see :func:`~dist_mtp.model.naming.logical_tensors`.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        flat = parameter.view(-1)
        for tensor in logical_tensors(name, tuple(parameter.shape), first_expert):
            generator = torch.Generator(parameter.device).manual_seed(tensor_seed(seed, tensor.name))
            values = torch.empty(tensor.shape, dtype=torch.float32, device=parameter.device)
            tensor.view(flat).copy_(values.normal_(0.0, std, generator=generator))
