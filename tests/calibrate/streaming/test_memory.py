"""Whether a model fits, and refusals before anything is written."""

from pathlib import Path

import pytest
import torch

from moeprune.anatomy.source import open_source
from moeprune.calibrate.streaming import memory
from moeprune.calibrate.streaming.memory import GIB, WORKING, available_memory, check_hidden, check_layers, fits
from moeprune.calibrate.streaming.passes import stream_stats
from moeprune.errors import RoomError
from tests.calibrate.streaming.both import text
from tests.models import save


@pytest.fixture
def source(tmp_path):
    return open_source(save("qwen3_moe", tmp_path / "model"))


def with_memory(monkeypatch, num_bytes: int) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: num_bytes)


def test_a_model_fits_if_it_does_with_room_to_stack_its_largest_parameter(source, monkeypatch):
    sizes = [parameter.numel() * 4 for parameter in source.anatomy.skeleton.parameters()]
    needed = sum(sizes) + 2 * max(sizes) + WORKING
    with_memory(monkeypatch, needed)
    assert fits(source, device="cpu")[0]
    with_memory(monkeypatch, needed - 1)
    possible, why = fits(source, device="cpu")
    assert not possible and why.endswith("GiB are available")
    assert fits(source, device="cpu", dtype="bfloat16")[0], "half as large"
    with_memory(monkeypatch, needed)
    assert not fits(source, device="cpu", sharing=2)[0], "two processes load it twice"


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    free = available_memory(torch.device("cpu"))
    assert 0 < free < 1 << 50
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{3 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{2 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 20}\n")
    assert available_memory(torch.device("cpu")) == 2 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(torch.device("cpu")) > 2 << 20


def test_a_device_without_room_for_two_layers_is_refused(monkeypatch):
    with_memory(monkeypatch, 3 * GIB)
    check_layers(2 * GIB, held=GIB, device=torch.device("cpu"))
    with pytest.raises(RoomError, match=r"2 layers of up to 2.10 GiB in memory, of which 4.00 GiB are left on cpu"):
        check_layers(int(2.1 * GIB), held=GIB, device=torch.device("cpu"))


def test_hidden_states_that_do_not_fit_in_memory_are_refused_with_the_way_out(monkeypatch):
    with_memory(monkeypatch, GIB)
    check_hidden(GIB, folder=None)
    with pytest.raises(RoomError, match=r"take 1.50 GiB, 1.00 GiB of memory are left. Keep them on .*--offload-hidden"):
        check_hidden(int(1.5 * GIB), folder=None)


def test_hidden_states_that_do_not_fit_on_the_disk_are_refused_before_any_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(RoomError, match=r"0.00 GiB are left on the disk of .*hidden"):
        stream_stats(source, rows=text(), batch_size=2, quiet=True, offload_hidden=tmp_path / "hidden")
    assert not any(path.is_file() for path in (tmp_path / "hidden").rglob("*"))


def test_streaming_reads_no_weight_that_text_does_not_need(tmp_path, monkeypatch):
    """Neither the head nor the final norm nor layers after the last one with experts."""
    from moeprune.calibrate.streaming.stored import Stored
    from tests.models import FAMILIES, build

    config = FAMILIES["qwen3_moe"]()
    config.mlp_only_layers = [2]
    monkeypatch.setitem(FAMILIES, "qwen3_moe", lambda: config)
    build("qwen3_moe").save_pretrained(tmp_path)
    read: list[str] = []
    original = Stored.read_to
    monkeypatch.setattr(Stored, "read_to", lambda self, place: (read.append(self.info.name), original(self, place))[1])
    whole = Stored.read
    monkeypatch.setattr(Stored, "read", lambda self, *args: (read.append(self.info.name), whole(self, *args))[1])
    source = open_source(tmp_path)
    stream_stats(source, rows=text(), batch_size=2, quiet=True)
    stored = set(source.checkpoint.tensors)
    assert {name for name in stored if name.startswith(("model.layers.0.", "model.layers.1.", "model.embed"))} <= set(
        read
    )
    assert len(read) == len(set(read)), "each is read once"


def test_a_rank_has_a_folder_of_its_own(source, tmp_path, monkeypatch):
    seen: list[Path] = []
    from moeprune.calibrate.streaming import work

    original = work.DiskShelf
    monkeypatch.setattr(work, "DiskShelf", lambda folder: (seen.append(folder), original(folder))[1])
    stream_stats(source, rows=text(), batch_size=2, quiet=True, offload_hidden=tmp_path / "hidden")
    assert seen == [tmp_path / "hidden" / "rank-0-of-1"]
