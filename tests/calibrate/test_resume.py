"""A calibration run that was stopped goes on to the very statistics of one that was not."""

import errno
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest
import torch

from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.resume import Partial, partial_folder
from moeprune.calibrate.stats import Stats
from moeprune.errors import StatsError
from moeprune.interrupts import Interrupted
from tests.calibrate.reference import experts_of, random_rows
from tests.fake_stats import fake_stats
from tests.models import build

INPUTS = {"model": "tiny", "batch_size": 2}
NUM_BATCHES = 5


@pytest.fixture
def model():
    return build("glm4_moe")


def run(model, folder=None, *, statistics: str = "merge", **options) -> Stats:
    """Five batches of two domains, three of one and two of the other."""
    anatomy = derive_anatomy(model.config)
    return collect_stats(
        model, anatomy=anatomy, facts=anatomy.facts(name="tiny", fingerprint="f" * 64), batch_size=2, quiet=True,
        domains=[random_rows("code", rows=5, padding=3), random_rows("math", rows=4, seed=1)], statistics=statistics,
        partial=None if folder is None else Partial(folder, INPUTS, **options),
    )  # fmt: skip


def at_batch(model, number: int, act: Callable[[], object]):
    """Do something in the middle of a batch, counted from 1."""
    calls = []

    def hook(*_):
        calls.append(None)
        if len(calls) == number:
            act()

    return model.get_submodule(experts_of(model)[0]).register_forward_pre_hook(hook)


def batches_run(model) -> list[None]:
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(None))
    return calls


def assert_same_bits(stats: Stats, other: Stats) -> None:
    arrays = dict(other.arrays())
    assert arrays.keys() == dict(stats.arrays()).keys()
    for name, array in stats.arrays():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


def fail() -> None:
    raise RuntimeError("the GPU fell off the bus")


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_by_a_signal_goes_on_where_it_was(model, tmp_path, number, signum):
    unbroken = run(model)
    hook = at_batch(model, number, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Interrupted) as stopped:
        run(model, tmp_path / "partial")
    hook.remove()
    assert stopped.value.status == 128 + signum
    kept = f" {tmp_path / 'partial'} holds the sums of {number - 1} of 5 batches; the same command goes on from there."
    assert str(stopped.value) == f"stopped by {signum.name}.{kept if number > 1 else ''}"
    calls = batches_run(model)
    again = run(model, tmp_path / "partial")
    assert len(calls) == NUM_BATCHES - (number - 1)
    assert_same_bits(again, unbroken)
    assert again.runs[0]["tokens"] == unbroken.runs[0]["tokens"]


def test_a_run_that_failed_goes_on_where_it_was(model, tmp_path):
    unbroken = run(model)
    hook = at_batch(model, 4, fail)
    with pytest.raises(RuntimeError, match="fell off the bus"):
        run(model, tmp_path)
    hook.remove()
    calls = batches_run(model)
    assert_same_bits(run(model, tmp_path), unbroken)
    assert len(calls) == 2


def test_handlers_are_as_they_were_after_a_run(model, tmp_path):
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    run(model, tmp_path)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_sums_are_saved_as_often_as_asked(model, tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(Partial, "save", lambda self, stats, progress: saves.append(progress["rows"]))
    run(model, tmp_path, every=0)
    assert saves == [
        {"code": 2, "math": 0}, {"code": 2, "math": 2}, {"code": 4, "math": 2}, {"code": 4, "math": 4},
        {"code": 5, "math": 4},
    ]  # fmt: skip
    saves.clear()
    run(model, tmp_path, every=3600)
    assert not saves


def full_disk(self, path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_does_not_end_a_run_that_is_still_to_be_finished(model, tmp_path, monkeypatch):
    unbroken, said = run(model), []
    monkeypatch.setattr(Stats, "save", full_disk)
    assert_same_bits(run(model, tmp_path, every=0, say=said.append), unbroken)
    assert len(said) == NUM_BATCHES
    assert said[0].startswith(f"{tmp_path}: unfinished sums cannot be saved (No space left on device). The run goes on")


def test_a_signal_with_a_full_disk_still_is_a_signal(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Stats, "save", full_disk)
    at_batch(model, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM\. Its sums could not be saved \(.*No space left"):
        run(model, tmp_path)


def test_sums_that_are_not_finite_are_not_kept(model, tmp_path):
    with torch.no_grad():
        model.get_submodule(experts_of(model)[0]).down_proj[4, 3, 2] = float("nan")
    with pytest.raises(StatsError, match=r"model\.layers\.1 expert 4 in domain"):
        run(model, tmp_path, every=0)
    assert not list(tmp_path.iterdir())


def saved(folder, inputs=INPUTS, **options) -> tuple[Partial, Stats]:
    partial, stats = Partial(folder, inputs, **options), fake_stats()
    partial.save(stats, {"batches": 3})
    return partial, stats


def test_what_was_saved_is_loaded(tmp_path):
    partial, stats = saved(tmp_path)
    loaded, progress = partial.load() or pytest.fail("nothing there")
    assert progress["batches"] == 3
    assert_same_bits(loaded, stats)
    assert stats.runs == fake_stats().runs


def test_other_options_start_afresh_and_say_which(tmp_path):
    saved(tmp_path)
    said = []
    assert Partial(tmp_path, INPUTS | {"batch_size": 4, "dtype": "float32"}, say=said.append).load() is None
    assert said == [f"{tmp_path}: sums of a run with other batch_size, dtype; starting afresh."]


def test_another_number_of_ranks_starts_afresh(tmp_path):
    saved(tmp_path, world=2, rank=1)
    said = []
    assert Partial(tmp_path, INPUTS, say=said.append).load() is None
    assert said == [f"{tmp_path}: sums of another number of ranks (rank-1-of-2); starting afresh."]


def test_a_rank_that_saved_nothing_begins_while_the_other_goes_on(tmp_path):
    saved(tmp_path, world=2, rank=1)
    said = []
    assert Partial(tmp_path, INPUTS, world=2, rank=0, say=said.append).load() is None
    assert Partial(tmp_path, INPUTS, world=2, rank=1, say=said.append).load() is not None
    assert not said


def test_a_damaged_file_is_not_gone_on_from(tmp_path):
    partial, _ = saved(tmp_path)
    partial.path.write_bytes(partial.path.read_bytes()[:-100])
    said = []
    partial.say = said.append
    assert partial.load() is None
    assert said[0].startswith(f"{partial.path}: cannot be read; starting afresh. ")


def test_finished_statistics_are_not_taken_for_unfinished_ones(tmp_path):
    partial, stats = saved(tmp_path)
    stats.runs = [{"seed": 0}]
    stats.save(partial.path)
    assert partial.load() is None


def test_the_last_rank_removes_the_folder(tmp_path):
    folder = partial_folder(tmp_path / "stats.safetensors")
    assert folder.name == "stats.safetensors.partial"
    first, second = (saved(folder, world=2, rank=rank)[0] for rank in (0, 1))
    saved(folder)  # of an earlier run with one rank
    first.remove()
    assert [path.name for path in folder.iterdir()] == ["rank-1-of-2.safetensors"]
    second.remove()
    assert not folder.exists()
