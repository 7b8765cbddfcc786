"""Numbers as people read them."""

from __future__ import annotations

import pytest

from moeprune.format import byte_unit, count, duration, percent, size, speed


def test_three_significant_digits_in_the_unit_that_reads_best():
    assert [count(n) for n in (0, 999, 4_476_672, 30_532_122_624, 2.5e6)] == ["0", "999", "4.48 M", "30.5 B", "2.50 M"]
    assert [size(n) for n in (0, 1023, 24 * 2**10, 8_964_000, 689 * 10**9)] == [
        "0 B", "1023 B", "24.0 KiB", "8.55 MiB", "642 GiB",
    ]  # fmt: skip


@pytest.mark.parametrize("unit", range(1, 5))
def test_no_number_is_written_with_an_exponent_or_as_a_thousand_of_a_smaller_unit(unit):
    """1,000 MiB once was "1e+03 MiB", and so was everything up to 1,023."""
    for n in (1000, 1010, 1023, 1023.4):
        assert size(n * 2 ** (10 * unit)) == f"{n:.0f} {['KiB', 'MiB', 'GiB', 'TiB'][unit - 1]}"
    assert count(1000**unit - 1e-4 * 1000**unit) == f"1.00 {'kMBT'[unit - 1]}"
    assert "e" not in count(999_499_999) + size(2**60 - 1)


def test_rounding_adds_no_digit():
    assert [count(n) for n in (9_996, 99_960, 999_400)] == ["10.0 k", "100 k", "999 k"]


def test_a_column_of_sizes_in_one_unit():
    unit = byte_unit(61_064_245_248)
    assert [size(n, unit) for n in (61_064_245_248, 2**20)] == ["56.9 GiB", "0.00 GiB"]


def test_shares_speeds_and_durations():
    assert [percent(x) for x in (0.7349, 0.9951, 0.051, 1.0)] == ["73 %", "99.5 %", "5.1 %", "100 %"]
    assert [duration(x) for x in (3.14, 725, 7800)] == ["3.1 s", "12 min 5 s", "2 h 10 min"]
    assert [speed(x) for x in (1234.4, 12.34)] == ["1\N{NARROW NO-BREAK SPACE}234", "12.3"]
