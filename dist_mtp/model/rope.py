"""Rotary position embedding (arXiv 2104.09864) on interleaved pairs, with YaRN scaling (arXiv 2309.00071)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dist_mtp.config import ModelConfig, RopeScalingConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN: ``0.1 * mscale * ln(factor) + 1``, 1 without extension."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def attention_scale(model: ModelConfig) -> float:
    """Factor on query-key products: ``1/sqrt(head width)``, times YaRN's temperature squared when extended."""
    scale = (model.qk_nope_head_dim + model.qk_rope_head_dim) ** -0.5
    scaling = model.rope_scaling
    if scaling.factor > 1 and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Radians per position of each rotated pair, fp32 [R / 2]."""
    width = model.qk_rope_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    original = 1.0 / (model.rope_theta**exponents)
    scaling = model.rope_scaling
    if scaling.factor <= 1:
        return original
    # Pairs that turn often within the original context keep their frequency, slow ones are interpolated by `factor`.
    low, high = _interpolation_band(model, scaling)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return original / scaling.factor * ramp + original * (1 - ramp)


def _interpolation_band(model: ModelConfig, scaling: RopeScalingConfig) -> tuple[float, float]:
    """Pair indices between which YaRN passes from extrapolation to interpolation."""
    width = model.qk_rope_head_dim

    def pair_with(turns: float) -> float:
        return (
            width
            * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(model.rope_theta))
        )

    low, high = (
        max(math.floor(pair_with(scaling.beta_fast)), 0),
        min(math.ceil(pair_with(scaling.beta_slow)), width - 1),
    )
    return low, high if high != low else high + 0.001


@functools.lru_cache(maxsize=8)
def rope_tables(model: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and pair, fp32 [T, R / 2] each."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies(model)).to(device)
    scaling = model.rope_scaling
    magnitude = 1.0
    if scaling.factor > 1:
        magnitude = (
            yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
            if scaling.mscale and scaling.mscale_all_dim
            else yarn_mscale(scaling.factor, 1.0)
        )
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs ``(x0, x1), (x2, x3), ...`` of the last dimension.

    The result holds all first members, then all second ones: queries and keys are reordered alike, so products agree
    with the released weights.

    Args:
        x: [..., T, R].
        cos, sin: [T, R / 2].
    """
    first, second = x[..., 0::2], x[..., 1::2]  # the fp32 tables make their products fp32
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
