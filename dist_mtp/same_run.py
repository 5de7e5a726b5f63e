"""Which settings a run cannot change half-way, because its checkpoints depend on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FIXED = ("model", "data", "tokenizer", "precision.name", "mtp", "train.seed", "train.seq_len")
"""Sections and keys that decide what is computed."""
_FREE = ("mtp.loss_weight", "mtp.loss_weight_steps", "data.cache_dir", "data.path")
"""Exceptions: a weight of the objective, and places of files whose content is compared by its hash."""


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed |= changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changed[prefix + key] = (old, new)
    return changed


def clashes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Changes between two configurations that make them different runs, as ``key old -> new, ...``; empty if none."""
    return ", ".join(
        f"{key} {old} -> {new}"
        for key, (old, new) in changed_keys(before, after).items()
        if key not in _FREE and any(key == fixed or key.startswith(fixed + ".") for fixed in _FIXED)
    )
