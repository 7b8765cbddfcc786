"""Numbers for people: counts, sizes, shares, speeds and durations as short text, with an ASCII minus sign."""

from __future__ import annotations

_COUNT_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))
_BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_ALMOST = 0.9995
"""What rounds to a whole unit is written in it: 1.00 M and not 1000 k."""


def count(number: float) -> str:
    """A number of parameters or tokens, three significant digits: ``4.48 M``."""
    for factor, unit in _COUNT_UNITS:
        if number >= _ALMOST * factor:
            return f"{_three_digits(number / factor)} {unit}"
    return f"{number:.0f}"


def byte_unit(largest: float) -> tuple[int, str]:
    """The unit in which a table of sizes reads best, as (bytes, name)."""
    return next(((factor, unit) for factor, unit in _BYTE_UNITS if largest >= _ALMOST * factor), (1, "B"))


def size(num_bytes: float, unit: tuple[int, str] | None = None) -> str:
    """A size in powers of 1024, three significant digits or more: ``8.55 MiB``.

    Args:
        num_bytes: The size.
        unit: A unit of :func:`byte_unit`; by default that in which this size reads best.
    """
    factor, name = unit or byte_unit(num_bytes)
    return f"{num_bytes:.0f} B" if factor == 1 else f"{_three_digits(num_bytes / factor)} {name}"


def percent(share: float) -> str:
    """A share as per cent: one decimal only near the ends, where it matters."""
    value = share * 100
    return f"{value:.1f} %" if value < 10 or 99 < value < 100 else f"{value:.0f} %"


def speed(tokens_per_second: float) -> str:
    """Tokens per second with thousands separated by a narrow space, three significant digits."""
    if tokens_per_second >= 1000:
        return f"{tokens_per_second:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return _three_digits(tokens_per_second)


def duration(seconds: float) -> str:
    """``3.1 s``, ``12 min 5 s`` or ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
