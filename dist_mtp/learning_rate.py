"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from dist_mtp.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Warmup-stable-cosine: linear to ``lr``, constant, then a cosine to ``min_lr_ratio * lr`` at the last step.

    Args:
        step: 1-based.

    Source: DeepSeek-V3 report (arXiv 2412.19437), section 4.2, with one decay instead of three.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    decay_start = max(total_steps - optim.decay_steps, optim.warmup_steps)
    if step <= decay_start:
        return optim.lr
    progress = (step - decay_start) / max(total_steps - decay_start, 1)
    floor = optim.min_lr_ratio
    return optim.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
