"""Tokenised text on disk: found again when nothing has changed, never otherwise, and never damaged."""

import json
import multiprocessing
import os

import pytest
import torch

from moeprune.calibrate.data import read_domain
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.text.cache import cache_dir, fingerprint, load_rows, save_rows
from moeprune.calibrate.text.packing import pack
from moeprune.data_spec import DataSpec
from tests.calibrate.tokenizer import CHAT_TEMPLATE, NUM_IDS, byte_tokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {at}"}) + "\n" for at in range(50)))
    return path


def read(path, **options) -> Rows:
    defaults = {"tokenizer": byte_tokenizer(), "length": 16, "tokens": 200, "seed": 0, "vocab_size": NUM_IDS}
    return read_domain(DataSpec(source=str(path)), **defaults | options, cache=True)


def same(a: Rows, b: Rows) -> bool:
    segments = (a.segments is None and b.segments is None) or torch.equal(a.segments, b.segments)
    return segments and torch.equal(a.ids, b.ids) and torch.equal(a.mask, b.mask) and a.packing == b.packing


def count_reads(monkeypatch) -> list[int]:
    from moeprune.calibrate import data

    reads = []
    plain = data.read_documents
    monkeypatch.setattr(data, "read_documents", lambda *args, **options: reads.append(1) or plain(*args, **options))
    return reads


@pytest.mark.parametrize("packing", ["isolate", "pad", "concat"])
def test_the_second_run_finds_the_rows_of_the_first(path, packing, monkeypatch):
    reads = count_reads(monkeypatch)
    first, second = read(path, packing=packing), read(path, packing=packing)
    assert same(first, second) and first.domain == second.domain == "a"
    assert len(reads) == 1
    assert second.ids.dtype == torch.int64


CHANGES = {
    "another seed": lambda path: {"seed": 1},
    "another length": lambda path: {"length": 8},
    "another budget": lambda path: {"tokens": 150},
    "another packing": lambda path: {"packing": "concat"},
    "another model": lambda path: {"vocab_size": NUM_IDS + 1},
    "another tokenizer": lambda path: {"tokenizer": byte_tokenizer(eos_token="<bos>")},
    "another chat template": lambda path: {"tokenizer": byte_tokenizer(chat_template=CHAT_TEMPLATE)},
    "other text": lambda path: path.write_text(path.read_text().replace("document 7", "document X")) and {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_of_something_else_are_not_taken(path, change, monkeypatch):
    read(path)
    reads = count_reads(monkeypatch)
    read(path, **CHANGES[change](path))
    assert len(reads) == 1


def test_text_of_the_same_size_and_time_is_told_apart(path, monkeypatch):
    read(path)
    stat = path.stat()
    path.write_text(path.read_text().replace("document 7", "document X"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    reads = count_reads(monkeypatch)
    read(path)
    assert len(reads) == 1


DAMAGE = {
    "cut short": lambda data: data[:-9],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "something else": lambda data: b"plain words" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_anew(path, folder, damage, monkeypatch):
    first = read(path)
    (file,) = (folder / "text").iterdir()
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    reads = count_reads(monkeypatch)
    assert same(read(path), first) and same(read(path), first)
    assert len(reads) == 1, "the first time; then it is whole again"


def test_rows_of_another_fingerprint_under_this_name_are_not_taken(path, folder):
    save_rows(pack("a", [[1, 2]], length=4, packing="pad", padding=0), "one")
    (folder / "text" / "one.safetensors").rename(folder / "text" / "two.safetensors")
    assert load_rows("two", "a") is None


def _read_in_a_process(path: str, queue) -> None:
    queue.put(read(path).ids.sum().item())


def test_ranks_that_begin_together_all_get_whole_rows(path, folder):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_read_in_a_process, args=(str(path), queue)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    sums = [queue.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert len(set(sums)) == 1
    assert [file.suffix for file in (folder / "text").iterdir()] == [".safetensors"], "nothing half-written is left"


def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_run(path, folder):
    folder.write_text("a file")
    with pytest.warns(UserWarning, match="tokenised text was not kept"):
        assert read(path).num_tokens == 200


def test_nothing_is_written_unless_asked(path, folder):
    read_domain(
        DataSpec(source=str(path)), tokenizer=byte_tokenizer(), length=16, tokens=200, seed=0, vocab_size=NUM_IDS
    )
    assert not folder.exists()


class Builder:
    """A stand-in for what `datasets` knows of a data set of the Hub."""

    def __init__(self, hash: str | None):
        self.hash = hash


@pytest.mark.parametrize(("hashes", "found_again"), [(("one", "one"), True), (("one", "two"), False)])
def test_a_data_set_of_the_hub_is_known_by_its_revision(monkeypatch, hashes, found_again):
    asked = []
    keys = []
    for hash in hashes:
        monkeypatch.setattr("datasets.load_dataset_builder", lambda *a, h=hash, **o: asked.append((a, o)) or Builder(h))
        spec = DataSpec(source="org/set", subset="en", files="en/*.gz")
        keys.append(fingerprint(spec, tokenizer=byte_tokenizer(), options={}))
    assert asked == [(("org/set", "en"), {"data_files": "en/*.gz"})] * 2
    assert (keys[0] == keys[1]) == found_again


def test_a_data_set_without_a_revision_is_not_kept(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *a, **o: Builder(None))
    assert fingerprint(DataSpec(source="org/set"), tokenizer=byte_tokenizer(), options={}) is None


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("MOEPRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "moeprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "moeprune"
