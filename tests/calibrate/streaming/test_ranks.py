"""Several processes stream all layers, each over its own rows."""

import pytest

from moeprune.anatomy.source import open_source
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.streaming.passes import stream_stats
from tests.calibrate.streaming.both import assert_equal_stats, text
from tests.calibrate.test_ranks import torchrun
from tests.test_families import build


@pytest.mark.parametrize("ranks", [2, 6])
def test_ranks_sum_what_one_does(tmp_path, ranks):
    """Of six ranks two have no rows: there are four batches."""
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    result = torchrun("-m", "tests.calibrate.streaming.rank", tmp_path / "model", tmp_path / "out", ranks=ranks)
    assert result.returncode == 0, result.stderr
    alone = stream_stats(open_source(tmp_path / "model"), rows=text(), batch_size=2, quiet=True, statistics="merge")
    together = Stats.load(tmp_path / "out")
    assert_equal_stats(together, alone, rtol=1e-13)
    assert together.runs[0]["ranks"] == ranks
