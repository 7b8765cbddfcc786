"""Bytes that are appended, by whatever way, against plain slices of the source; hashes against xxhash itself."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.errors import ExportError
from moeprune.export import copying
from moeprune.export.copying import Appender, hash_file, is_sparse, joined, segments
from moeprune.export.slices import ByteRange

MB = 1 << 20


def noise(path: Path, size: int = 3 * MB + 777) -> bytes:
    data = np.random.default_rng(0).bytes(size)
    path.write_bytes(data)
    return data


def append(target: Path, ranges: list[ByteRange], *, prefix: bytes = b"header!!") -> tuple[bytes, str, int]:
    """What was written, its hash as the appender gives it, and the bytes that were reported."""
    reported: list[int] = []
    size = len(prefix) + sum(piece.end - piece.start for piece in ranges)
    with Appender(target, size=size, locate=lambda file: file, progress=reported.append) as appender:
        appender.write(prefix)
        appender.copy(ranges)
        assert appender.position == size
        digest = appender.digest
    return target.read_bytes(), digest, sum(reported)


def refuse_with(number: int):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    return refuse


def ranges_of(file: Path, *pairs: tuple[int, int]) -> list[ByteRange]:
    return [ByteRange(file, start, end) for start, end in pairs]


LARGE_AND_SMALL = ((5, 9), (9, 300_000), (400_000, 400_016), (400_020, 400_050), (500_000, 3 * MB), (7, 8))


@pytest.mark.parametrize("number", [None, *sorted(copying.NO_KERNEL_COPY)])
def test_copying_in_the_kernel_and_through_a_buffer_give_the_same_file(tmp_path, monkeypatch, number):
    data = noise(tmp_path / "s")
    if number is not None:
        monkeypatch.setattr(os, "copy_file_range", refuse_with(number))
    written, digest, reported = append(tmp_path / "t", ranges_of(tmp_path / "s", *LARGE_AND_SMALL))
    expected = b"header!!" + b"".join(data[a:b] for a, b in LARGE_AND_SMALL)
    assert written == expected
    assert digest == xxhash.xxh3_128_hexdigest(expected)
    assert reported == len(expected) - 8


def test_a_system_without_the_kernel_call(tmp_path, monkeypatch):
    data = noise(tmp_path / "s")
    monkeypatch.delattr(os, "copy_file_range")
    assert append(tmp_path / "t", ranges_of(tmp_path / "s", (3, 2 * MB)), prefix=b"")[0] == data[3 : 2 * MB]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_ranges_of_any_files(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("ranges")
    contents = {folder / name: noise(folder / name, size) for name, size in (("a", 300_000), ("b", 70_001))}
    pieces = []
    for _ in range(data.draw(st.integers(0, 12))):
        file = data.draw(st.sampled_from(sorted(contents)))
        start = data.draw(st.integers(0, len(contents[file])))
        pieces.append(ByteRange(file, start, data.draw(st.integers(start, len(contents[file])))))
    written, digest, _ = append(folder / "t", pieces)
    expected = b"header!!" + b"".join(contents[piece.file][piece.start : piece.end] for piece in pieces)
    assert (written, digest) == (expected, xxhash.xxh3_128_hexdigest(expected))


def test_a_kernel_that_copies_less_than_asked_is_asked_again(tmp_path, monkeypatch):
    data = noise(tmp_path / "s", 200_000)
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda s, t, count, a, b: real(s, t, min(count, 9999), a, b))
    assert append(tmp_path / "t", ranges_of(tmp_path / "s", (1, 200_000)))[0] == b"header!!" + data[1:]


@pytest.mark.parametrize("gives_up_by", ["refusing", "copying nothing"])
def test_a_kernel_that_gives_up_half_way_is_replaced_by_a_buffer(tmp_path, monkeypatch, gives_up_by):
    """Some kernels answer 0 before the end for files they cannot splice (fixed in Linux 5.19)."""
    data = noise(tmp_path / "s", 200_000)
    real, calls = os.copy_file_range, []

    def sometimes(source, target, count, a, b):
        calls.append(a)
        if len(calls) == 1:
            return real(source, target, 10_007, a, b)
        return refuse_with(errno.EXDEV)() if gives_up_by == "refusing" else 0

    monkeypatch.setattr(os, "copy_file_range", sometimes)
    assert append(tmp_path / "t", ranges_of(tmp_path / "s", (1, 200_000)))[0] == b"header!!" + data[1:]
    assert len(calls) == 2


def test_another_pair_of_files_is_tried_in_the_kernel_again(tmp_path, monkeypatch):
    noise(tmp_path / "far"), noise(tmp_path / "near")
    far = (tmp_path / "far").stat().st_ino
    real, by_kernel = os.copy_file_range, []

    def kernel(source, target, count, a, b):
        if os.fstat(source).st_ino == far:
            refuse_with(errno.EXDEV)()
        by_kernel.append(count)
        return real(source, target, count, a, b)

    monkeypatch.setattr(os, "copy_file_range", kernel)
    pieces = ranges_of(tmp_path / "far", (0, MB)) + ranges_of(tmp_path / "near", (0, MB))
    append(tmp_path / "t", pieces)
    assert sum(by_kernel) == MB


def test_a_full_disk_is_not_mistaken_for_a_missing_kernel_call(tmp_path, monkeypatch):
    noise(tmp_path / "s")
    monkeypatch.setattr(os, "copy_file_range", refuse_with(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        append(tmp_path / "t", ranges_of(tmp_path / "s", (0, MB)))


@pytest.mark.parametrize("in_kernel", [True, False])
@pytest.mark.parametrize("start", [0, 199_000])
def test_a_source_that_shrinks_while_it_is_read_is_noticed(tmp_path, monkeypatch, in_kernel, start):
    noise(tmp_path / "s", 199_990)
    if not in_kernel:
        monkeypatch.setattr(os, "copy_file_range", refuse_with(errno.EXDEV))
    with pytest.raises(ExportError) as error:
        append(tmp_path / "t", ranges_of(tmp_path / "s", (start, 200_000)))
    assert str(error.value) == (
        f"{tmp_path / 's'}: ends at byte 199990, expected 200000. Did another program write to it?"
    )


def test_a_file_is_opened_once_however_many_ranges_it_gives(tmp_path, monkeypatch):
    noise(tmp_path / "s")
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *args: opened.append(Path(path).name) or real(path, *args))
    append(tmp_path / "t", ranges_of(tmp_path / "s", *((n * 100_000, n * 100_000 + 70_000) for n in range(30))))
    assert opened == ["t", "s"]


def test_small_ranges_near_each_other_are_read_together(tmp_path, monkeypatch):
    """The expert axis of a tensor may be its last one: a range is then a few bytes, and there are millions of them."""
    data = noise(tmp_path / "s")
    pairs = [(n * 16, n * 16 + 6) for n in range(50_000)]
    reads, real = [], os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: reads.append(count) or real(fd, count, offset))
    written, _, reported = append(tmp_path / "t", ranges_of(tmp_path / "s", *pairs), prefix=b"")
    assert written == b"".join(data[a:b] for a, b in pairs)
    assert reported == 300_000
    assert len(reads) == 1 and max(reads) <= copying.WINDOW_BYTES


def test_memory_for_small_ranges_is_bounded(tmp_path, monkeypatch):
    noise(tmp_path / "s")
    monkeypatch.setattr(copying, "WINDOW_BYTES", 100_000)
    reads, real = [], os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: reads.append(count) or real(fd, count, offset))
    append(tmp_path / "t", ranges_of(tmp_path / "s", *((n * 1000, n * 1000 + 500) for n in range(3000))))
    assert max(reads) <= 100_000


def test_neighbouring_ranges_are_joined():
    a, b = Path("a"), Path("b")
    pieces = [ByteRange(a, 0, 4), ByteRange(a, 4, 9), ByteRange(a, 10, 12), ByteRange(b, 12, 13), ByteRange(b, 13, 14)]
    assert list(joined(pieces)) == [ByteRange(a, 0, 9), ByteRange(a, 10, 12), ByteRange(b, 12, 14)]
    assert list(joined([])) == []


# Holes


def with_holes(path: Path) -> bytes:
    """Data, 2 MB of nothing, data, 1 MB of nothing at the end."""
    rng = random.Random(0)
    with path.open("wb") as file:
        file.write(rng.randbytes(100_000))
        file.seek(2 * MB, os.SEEK_CUR)
        file.write(rng.randbytes(100_000))
        file.truncate(file.tell() + MB)
    assert is_sparse(path.stat()), "this file system stores zeros"
    return path.read_bytes()


@pytest.mark.parametrize("in_kernel", [True, False])
@pytest.mark.parametrize(("start", "end"), [(0, None), (17, 1_000_000), (150_000, 1_500_000), (2_150_000, None)])
def test_holes_stay_holes(tmp_path, monkeypatch, in_kernel, start, end):
    data = with_holes(tmp_path / "s")
    if not in_kernel:
        monkeypatch.setattr(os, "copy_file_range", refuse_with(errno.EXDEV))
    end = end or len(data)
    written, digest, reported = append(tmp_path / "t", ranges_of(tmp_path / "s", (start, end)))
    assert written == b"header!!" + data[start:end]
    assert digest == xxhash.xxh3_128_hexdigest(written)
    assert reported == end - start
    stored = sum(b - a for a, b in ((0, 100_000), (2 * MB + 100_000, 2 * MB + 200_000)) if a < end and b > start)
    assert (tmp_path / "t").stat().st_blocks * 512 <= stored + 20 * 4096


def test_segments_tile_a_range(tmp_path):
    data = with_holes(tmp_path / "s")
    with (tmp_path / "s").open("rb") as file:
        parts = list(segments(file.fileno(), 50_000, len(data)))
    assert [part[0] for part in parts] == [50_000, *(part[1] for part in parts[:-1])]
    assert parts[-1][1] == len(data)
    assert all(not any(data[start:end]) for start, end, stored in parts if not stored)
    assert sum(end - start for start, end, stored in parts if not stored) > 2.9 * MB


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    for name, data in (("full", noise(tmp_path / "full")), ("sparse", with_holes(tmp_path / "sparse"))):
        reported: list[int] = []
        assert hash_file(tmp_path / name, progress=reported.append) == xxhash.xxh3_128_hexdigest(data)
        assert sum(reported) == len(data)


# Block sharing


def test_ranges_that_lie_alike_in_both_files_are_offered_to_the_kernel_in_whole_blocks(tmp_path, monkeypatch):
    """File systems that share blocks refuse a range that does not begin at a block, and copy its bytes instead."""
    noise(tmp_path / "s")
    calls, real = [], os.copy_file_range
    monkeypatch.setattr(
        os, "copy_file_range", lambda s, t, count, a, b: calls.append((a, b, count)) or real(s, t, count, a, b)
    )
    append(tmp_path / "t", ranges_of(tmp_path / "s", (4096 + 8, 2 * MB)), prefix=b"12345678")
    assert calls[0] == (4096 + 8, 8, 4096 - 8)
    assert calls[1][:2] == (8192, 4096)
    calls.clear()
    append(tmp_path / "t", ranges_of(tmp_path / "s", (4096 + 9, 2 * MB)), prefix=b"12345678")
    assert calls[0][2] == 2 * MB - 4096 - 9


# Reading ahead


def test_the_system_is_told_in_time_what_will_be_read_and_of_nothing_else(tmp_path, monkeypatch):
    """Otherwise the disk rests while bytes are hashed; telling all at once would fill the memory."""
    noise(tmp_path / "s", 6 * MB)
    monkeypatch.setattr(copying, "KERNEL_BYTES", MB // 2)
    monkeypatch.setattr(copying, "AHEAD_BYTES", MB)
    told: list[tuple[int, int]] = []
    read: list[int] = []
    real = os.copy_file_range
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, count, advice: told.append((start, start + count)))
    monkeypatch.setattr(
        os, "copy_file_range", lambda s, t, n, a, b: read.append(a) or told.append((-a, 0)) or real(s, t, n, a, b)
    )
    pieces = [(0, 2 * MB), (3 * MB, 4 * MB), (5 * MB, 6 * MB)]
    append(tmp_path / "t", ranges_of(tmp_path / "s", *pieces))
    wanted = [byte for a, b in pieces for byte in range(a, b, MB // 2)]
    assert read == wanted
    announced: list[int] = []
    for start, end in told:
        if start <= 0 and end == 0:  # a read: at most a megabyte of what was told is still to come
            position = wanted.index(-start)
            assert len(announced) - position <= 1 + 2 + 1
            continue
        announced += range(start, end, MB // 2)
    assert set(announced) <= set(wanted)
    assert len(announced) == len(set(announced)) >= len(wanted) - 1, "only the first read comes unannounced"
