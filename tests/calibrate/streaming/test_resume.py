"""A streamed run that is stopped goes on from the last finished layer, to the same statistics."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from moeprune.anatomy.source import Source, open_source
from moeprune.calibrate.resume import Partial
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.streaming.layers import LayerStream
from moeprune.calibrate.streaming.passes import stream_stats
from moeprune.errors import RoomError
from moeprune.interrupts import Interrupted
from tests.calibrate.streaming.both import assert_equal_stats, text
from tests.test_families import build

# A chain of layers; residual streams of blocks; an encoder that all layers of a decoder read; keys that layers share.
TYPES = ("qwen3_moe", "inkling2_text", "switch_transformers", "mistral_large4")


class Killed(BaseException):
    """What no code handles."""


@pytest.fixture(scope="module", params=TYPES)
def source(request, tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(folder)
    return open_source(folder)


@pytest.fixture
def advanced(monkeypatch) -> list[int]:
    """The positions that were run."""
    positions: list[int] = []
    original = LayerStream.advance

    def advance(self, position, forwards, **options):
        positions.append(position)
        yield from original(self, position, forwards, **options)

    monkeypatch.setattr(LayerStream, "advance", advance)
    return positions


def end_at(monkeypatch, position: int, end) -> None:
    """Call ``end`` before the second batch of a layer."""
    original = LayerStream.advance

    def advance(self, at, forwards, **options):
        for batch in original(self, at, forwards, **options):
            if at == position and batch == 1:
                end()
            yield batch

    monkeypatch.setattr(LayerStream, "advance", advance)


def kill():
    raise Killed


def partial(folder: Path, **inputs) -> Partial:
    return Partial(folder / "sums", {"text": "tiny", **inputs})


def stream(source: Source, folder: Path, **inputs) -> Stats:
    return stream_stats(
        source, rows=text(), batch_size=2, quiet=True, statistics="merge", partial=partial(folder, **inputs),
        offload_hidden=folder / "hidden",
    )  # fmt: skip


def stream_until_killed(monkeypatch, source: Source, folder: Path, *, position: int = 2, **inputs) -> None:
    with monkeypatch.context() as patch:
        end_at(patch, position, kill)
        with pytest.raises(Killed):
            stream(source, folder, **inputs)


@pytest.mark.parametrize("position", [1, 3])
def test_a_killed_run_goes_on_from_the_last_finished_layer(source, tmp_path, advanced, monkeypatch, position):
    unbroken = stream_stats(source, rows=text(), batch_size=2, quiet=True, statistics="merge")
    layers = list(advanced)
    stream_until_killed(monkeypatch, source, tmp_path, position=position)
    advanced.clear()
    resumed = stream(source, tmp_path)
    assert advanced == layers[position:]
    assert_equal_stats(resumed, unbroken, rtol=0)
    assert not any((tmp_path / "hidden").iterdir())


def test_a_run_that_has_ended_is_not_repeated(source, tmp_path, advanced):
    first = stream(source, tmp_path)
    advanced.clear()
    assert_equal_stats(stream(source, tmp_path), first, rtol=0)
    assert advanced == []


def test_other_inputs_start_afresh(tmp_path, advanced, monkeypatch):
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    stream_until_killed(monkeypatch, source, tmp_path, length=8)
    advanced.clear()
    stream(source, tmp_path, length=9)
    assert advanced == [0, 1, 2, 3]


def test_hidden_states_that_were_deleted_start_afresh(tmp_path, advanced, monkeypatch):
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    stream_until_killed(monkeypatch, source, tmp_path)
    for file in (tmp_path / "hidden").rglob("*.bin"):
        file.write_bytes(file.read_bytes()[:-1])
    advanced.clear()
    stream(source, tmp_path)
    assert advanced == [0, 1, 2, 3]


def test_sums_of_a_whole_model_pass_are_not_gone_on_from(tmp_path, advanced):
    """The two kinds of pass save sums under one name, of parts of the text that are not the same."""
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    done = stream(source, tmp_path / "other")
    partial(tmp_path).save(done, {"batches": 2, "seconds": 1.0})
    advanced.clear()
    assert stream(source, tmp_path).tokens.tolist() == done.tokens.tolist()
    assert advanced == [0, 1, 2, 3]


def test_a_stopped_run_says_how_to_go_on(tmp_path, monkeypatch):
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    end_at(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"the text after 2 layers; the same command goes on from there"):
        stream(source, tmp_path)
    with pytest.raises(Interrupted, match=r"the next run starts again; --offload-hidden keeps them"):
        stream_stats(source, rows=text(), batch_size=2, quiet=True, partial=partial(tmp_path))


def test_a_gpu_without_memory_for_a_batch_is_told_with_what_helps(tmp_path, monkeypatch):
    def overflow():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    build("qwen3_moe").save_pretrained(tmp_path / "model")
    end_at(monkeypatch, 2, overflow)
    with pytest.raises(RoomError, match=r"batches of 2 rows beside the weights of two layers\. Give a smaller "):
        stream(open_source(tmp_path / "model"), tmp_path)


def test_what_is_kept_does_not_grow_with_the_layers(tmp_path, monkeypatch):
    """A chain keeps the outputs of one layer, or of two while the second is being run."""
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    seen = []
    end_at(monkeypatch, 3, lambda: seen.extend(path.name for path in (tmp_path / "hidden").rglob("*.bin")))
    stream(source, tmp_path)
    assert set(seen) <= {"output-2.bin", "output-3.bin"}
    header = (tmp_path / "sums" / "rank-0-of-1.safetensors").read_bytes()
    assert json.dumps("output-0") not in header.decode("latin-1")
