"""Numbers as strict JSON, which has no NaN and no infinity, and back.

Non-finite floats become the strings ``"nan"``, ``"inf"`` and ``"-inf"``: ``null`` would lose which of them it was, and
Python's bare ``NaN`` is refused by jq, JavaScript and most other readers. Finite floats are written by ``repr``, the
shortest text that reads back to the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any) -> Any:
    """``value`` with every non-finite float, at any depth of dictionaries, replaced by its name."""
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def decode(value: Any) -> Any:
    """Inverse of :func:`encode`."""
    if isinstance(value, Mapping):
        return {key: decode(item) for key, item in value.items()}
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def to_line(row: Mapping[str, Any]) -> str:
    """One JSON object on one line, newline included."""
    return json.dumps(encode(row), allow_nan=False) + "\n"
