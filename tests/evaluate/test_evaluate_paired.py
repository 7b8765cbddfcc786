import math
import statistics

import numpy as np
import pytest

from moeprune.evaluate.paired import paired_difference, ratio


def test_without_weights_it_is_the_mean_and_its_usual_error():
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    value, stderr = ratio(values)
    assert value == pytest.approx(statistics.mean(values))
    assert stderr == pytest.approx(statistics.stdev(values) / math.sqrt(6))


def test_ratio_error_agrees_with_a_bootstrap_over_documents():
    source = np.random.default_rng(0)
    sizes = source.integers(50, 900, size=300).astype(float)
    bits = sizes * source.normal(2.0, 0.4, size=300)
    value, stderr = ratio(bits.tolist(), weights=sizes.tolist())
    draws = source.integers(0, 300, size=(4000, 300))
    resampled = bits[draws].sum(1) / sizes[draws].sum(1)
    assert value == pytest.approx(bits.sum() / sizes.sum())
    assert stderr == pytest.approx(resampled.std(ddof=1), rel=0.06)


def test_paired_ratio_error_agrees_with_a_bootstrap_and_beats_the_unpaired_one():
    source = np.random.default_rng(1)
    sizes = source.integers(50, 900, size=300).astype(float)
    baseline = sizes * source.normal(2.0, 0.4, size=300)
    bits = baseline * 1.05 + sizes * source.normal(0.0, 0.05, size=300)
    difference, stderr = paired_difference(bits.tolist(), baseline=baseline.tolist(), weights=sizes.tolist())
    draws = source.integers(0, 300, size=(4000, 300))
    resampled = (bits[draws] - baseline[draws]).sum(1) / sizes[draws].sum(1)
    errors = [ratio(x.tolist(), weights=sizes.tolist())[1] for x in (bits, baseline)]
    assert difference == pytest.approx((bits.sum() - baseline.sum()) / sizes.sum())
    assert stderr == pytest.approx(resampled.std(ddof=1), rel=0.06)
    assert stderr < 0.3 * math.hypot(*errors)


def test_paired_accuracy_is_the_mean_of_the_item_differences():
    ours, theirs = [1.0, 1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0, 0.0]
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    difference, stderr = paired_difference(ours, baseline=theirs)
    assert difference == pytest.approx(statistics.mean(gaps))
    assert stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(5))


def test_one_item_has_no_error():
    assert ratio([6.0], weights=[4.0]) == (1.5, None)
