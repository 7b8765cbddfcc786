"""Sizes, counts, speeds and durations as short text, with an ASCII minus sign."""

from __future__ import annotations

_BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_COUNT_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))


def byte_unit(largest: int) -> tuple[int, str]:
    """The unit in which a table of sizes reads best, as (bytes, name)."""
    return next(((size, name) for size, name in _BYTE_UNITS if largest >= size), (1, "B"))


def write_bytes(count: int, unit: tuple[int, str]) -> str:
    """A size in the given unit, three significant digits or more."""
    return f"{_three_digits(count / unit[0])} {unit[1]}"


def write_count(count: int) -> str:
    """A number of parameters or tokens: ``4.48 M``."""
    for size, name in _COUNT_UNITS:
        if count >= size:
            return f"{_three_digits(count / size)} {name}"
    return str(count)


def write_percent(share: float) -> str:
    """A share as per cent: one decimal only near the ends, where it matters."""
    percent = share * 100
    return f"{percent:.1f} %" if percent < 10 or 99 < percent < 100 else f"{percent:.0f} %"


def write_speed(tokens_per_second: float) -> str:
    """Tokens per second with thousands separated by a narrow space, three significant digits."""
    if tokens_per_second >= 1000:
        return f"{tokens_per_second:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return _three_digits(tokens_per_second)


def write_seconds(seconds: float) -> str:
    """A duration: ``3.1 s``, ``12 min 5 s`` or ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
