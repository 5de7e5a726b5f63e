"""Numbers in the few characters that a console column has."""

from __future__ import annotations

import math
from collections.abc import Sequence


def fit(value: float | None, width: int, decimals: int) -> str:
    """``value`` right-aligned in exactly ``width`` >= 6 characters; digits are given up before width is.

    >>> fit(3.14159, 7, 4), fit(314.159, 7, 4), fit(3.14159e9, 7, 4), fit(None, 7, 4)
    (' 3.1416', '314.159', '3.1e+09', '      -')
    """
    if value is None:
        return "-".rjust(width)
    for spec in (*(f".{places}f" for places in range(decimals, -1, -1)), ".1e", ".0e"):
        if len(text := format(value, spec)) <= width:
            break
    return text.rjust(width)


def percent(share: float | None) -> str:
    """A share of 0..1 in six characters.

    >>> percent(0.1234), percent(1.0)
    (' 12.3%', '100.0%')
    """
    return "     -" if share is None else f"{100 * share:5.1f}%"


def compact(number: float) -> str:
    """Up to five characters with a decimal multiplier.

    >>> compact(87), compact(3914), compact(123_456)
    ('87.0', '3.9k', '123k')
    """
    for suffix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or suffix == "T":
            break
        number /= 1000
    return f"{number:.{1 if abs(number) < 99.95 else 0}f}{suffix}"


def duration(seconds: float | None) -> str:
    """The two largest units, up to six characters.

    >>> duration(45), duration(150), duration(3725), duration(93_600)
    ('45s', '2m30s', '1h02m', '1d02h')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def span(names: Sequence[str]) -> str:
    """First and last of names in order, such as the units of a stage.

    >>> span(["embed", "layers.0.attention", "layers.0.feed_forward"]), span(["head"]), span([])
    ('embed .. layers.0.feed_forward', 'head', 'nothing')
    """
    if not names:
        return "nothing"
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
