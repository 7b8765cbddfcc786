"""Several processes calibrate together: what one process sums, and nothing hangs when one of them fails."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moeprune.calibrate.ranks import Ranks, _own_device
from moeprune.calibrate.stats import Stats
from moeprune.errors import MoePruneError
from tests.calibrate.rank import calibrate

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What two ranks write that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "two.safetensors"
    result = torchrun("-m", "tests.calibrate.rank", out)
    assert result.returncode == 0, result.stderr
    return out


def test_two_ranks_sum_what_one_does(whole, tmp_path):
    two, one = Stats.load(whole), calibrate(Ranks(), tmp_path / "one.inputs")
    arrays = dict(two.arrays())
    assert arrays.keys() == dict(one.arrays()).keys()
    for name, array in one.arrays():
        if name.endswith("count") or name.endswith("tokens"):
            np.testing.assert_array_equal(arrays[name], array, err_msg=name)
        else:
            np.testing.assert_allclose(arrays[name], array, rtol=1e-13, atol=1e-12, err_msg=name)
    assert two.runs[0]["tokens"] == one.runs[0]["tokens"] == {"code": 52, "math": 44}
    assert two.runs[0]["ranks"] == 2
    assert whole.with_suffix(".inputs").read_bytes() == (tmp_path / "one.inputs").read_bytes()


def test_a_rank_that_fails_ends_one_that_waits_for_it(tmp_path):
    begun = time.monotonic()
    result = torchrun("-m", "tests.calibrate.rank", tmp_path / "out", "raise")
    assert result.returncode != 0
    assert "error: rank 1 of 2: this rank's text is unreadable" in result.stderr
    assert result.stderr.count("this rank's text is unreadable") == 1  # and no traceback
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_ranks_of_which_one_was_killed_go_on_to_the_sums_of_ranks_that_were_not(whole, tmp_path, rank):
    """The killed one has saved its first batch and loses its second; how far the other one comes is left to chance."""
    killed = tmp_path / "killed"
    result = torchrun("-m", "tests.calibrate.rank", killed, f"killed-{rank}")
    assert result.returncode != 0 and not killed.exists()
    done = Stats.load(tmp_path / "killed.partial" / f"rank-{rank}-of-2.safetensors").runs[0]["partial"]
    assert done["batches"] == 1
    result = torchrun("-m", "tests.calibrate.rank", killed, "again")
    assert result.returncode == 0, result.stderr
    found, expected = (dict(Stats.load(out).arrays()) for out in (killed, whole))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert killed.with_suffix(".inputs").read_bytes() == whole.with_suffix(".inputs").read_bytes()


def test_a_rank_that_is_killed_ends_the_others(tmp_path):
    result = torchrun("-m", "tests.calibrate.rank", tmp_path / "out", "die")
    assert result.returncode != 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_unit_of_work_belongs_to_one_rank(count, world):
    shares = [Ranks(rank, world).share(count) for rank in range(world)]
    assert sorted(unit for share in shares for unit in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_of_its_own_is_the_only_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks.current("cpu")
    assert (ranks.rank, ranks.world, ranks.device, ranks.is_first) == (0, 1, "cpu", True)
    assert ranks.once(lambda: 5) == 5 and ranks.gather(5) == [5]


def test_the_nth_rank_of_a_machine_takes_its_nth_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [_own_device("cuda", local=local, here=2) for local in (0, 1)] == ["cuda:0", "cuda:1"]
    assert _own_device("cuda:1", local=0, here=1) == "cuda:1"
    with pytest.raises(MoePruneError, match=r"^4 ranks on a machine where torch sees 2 GPUs"):
        _own_device("cuda", local=2, here=4)
    with pytest.raises(MoePruneError, match=r"^--device cuda:1 is one GPU for 2 ranks of this machine"):
        _own_device("cuda:1", local=0, here=2)
