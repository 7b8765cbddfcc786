"""Append byte ranges to a file: inside the kernel where it can, else through a buffer; hashed on the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType

import xxhash

from moeprune.errors import ExportError
from moeprune.export.layout import BLOCK_BYTES
from moeprune.export.slices import ByteRange

KERNEL_BYTES = 8 << 20
BUFFER_BYTES = 512 << 10  # fits the second-level cache: read, hash and write touch memory once
SMALL_BYTES = 64 << 10
WINDOW_BYTES = 4 << 20
AHEAD_BYTES = 16 << 20
NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
HASH = "xxh3_128"

Progress = Callable[[int], object]
Locate = Callable[[Path], Path]


class Appender:
    """A new file that is written from front to back.

    Ranges that the source does not store (holes of a sparse file) are left out of the target too; they read as zeros.

    Args:
        path: The file to make.
        size: Its final size in bytes.
        locate: Gives the file to read for a source path.
        progress: Called with the number of bytes since the last call.

    Attributes:
        position: Bytes so far.
    """

    def __init__(self, path: Path, *, size: int, locate: Locate, progress: Progress) -> None:
        self.position = 0
        self._locate, self._progress = locate, progress
        self._hash = xxhash.xxh3_128()
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._zeros = memoryview(bytes(BUFFER_BYTES))
        self._kernel = hasattr(os, "copy_file_range")
        self._source: _Source | None = None
        self._target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        os.ftruncate(self._target, size)

    def __enter__(self) -> Appender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_source()
        os.close(self._target)

    @property
    def digest(self) -> str:
        """XXH3-128 of all bytes so far, in hexadecimal."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        self._hash.update(data)
        self._put(data)

    def copy(self, ranges: Iterable[ByteRange]) -> None:
        """Append byte ranges of source files.

        Raises:
            ExportError: If a source file ends before its range.
        """
        for batch, following in _with_next(_batched(joined(ranges))):
            source = self._open(batch[0].file)
            source.following = following[0] if following and following[0].file == source.file else None
            if len(batch) == 1 and batch[0].end - batch[0].start >= SMALL_BYTES:
                self._copy_large(source, batch[0])
            else:
                self._copy_small(source, batch)

    def read(self, piece: ByteRange) -> bytes:
        """The bytes of a range.

        Raises:
            ExportError: If the file ends before it.
        """
        source, parts, offset = self._open(piece.file), [], piece.start
        while offset < piece.end:
            part = os.pread(source.fd, piece.end - offset, offset)
            if not part:
                raise _too_short(piece, offset)
            parts.append(part)
            offset += len(part)
        return b"".join(parts)

    def _copy_small(self, source: _Source, batch: list[ByteRange]) -> None:
        """Many small ranges near each other: one read over all of them, one write."""
        begin = batch[0].start
        data = memoryview(self.read(ByteRange(batch[0].file, begin, batch[-1].end)))
        self.write(b"".join(data[piece.start - begin : piece.end - begin] for piece in batch))
        self._progress(sum(piece.end - piece.start for piece in batch))

    def _copy_large(self, source: _Source, piece: ByteRange) -> None:
        for start, end, stored in source.segments(piece.start, piece.end):
            if stored:
                self._copy_stored(source, ByteRange(piece.file, start, end))
            else:
                self._skip(end - start)

    def _copy_stored(self, source: _Source, piece: ByteRange) -> None:
        offset = piece.start
        while offset < piece.end:
            wanted = min(KERNEL_BYTES, piece.end - offset)
            ahead = -offset % BLOCK_BYTES
            if ahead and (offset - self.position) % BLOCK_BYTES == 0 and wanted > ahead:
                wanted = ahead  # what follows begins at a block in both files and can be shared instead of copied
            source.announce(offset + wanted, piece.end)
            done = self._in_kernel(source, wanted, offset) if self._kernel else 0
            done = done or self._through_buffer(source, wanted, offset)
            if done == 0:
                raise _too_short(piece, offset)
            offset += done
            self._progress(done)

    def _in_kernel(self, source: _Source, wanted: int, offset: int) -> int:
        """Bytes that were copied; 0 at the end of the source, or if these file systems do not do it."""
        try:
            done = os.copy_file_range(source.fd, self._target, wanted, offset, self.position)
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
            done = 0
        if done == 0:
            self._kernel = False
        end = offset + done
        while offset < end:  # the hash is of the source's bytes: what was just copied is still in memory
            count = os.preadv(source.fd, [self._buffer[: end - offset]], offset)
            if count == 0:
                return 0
            self._hash.update(self._buffer[:count])
            offset += count
        self.position += done
        return done

    def _through_buffer(self, source: _Source, wanted: int, offset: int) -> int:
        count = os.preadv(source.fd, [self._buffer[:wanted]], offset)
        self.write(self._buffer[:count])
        return count

    def _skip(self, count: int) -> None:
        self.position += count
        while count:
            part = min(count, BUFFER_BYTES)
            self._hash.update(self._zeros[:part])
            self._progress(part)
            count -= part

    def _put(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            done = os.pwrite(self._target, rest, self.position)
            self.position += done
            rest = rest[done:]

    def _open(self, file: Path) -> _Source:
        if self._source is None or self._source.file != file:
            self._close_source()
            self._source = _Source(file, self._locate(file))
            self._kernel = hasattr(os, "copy_file_range")
        return self._source

    def _close_source(self) -> None:
        if self._source is not None:
            os.close(self._source.fd)
            self._source = None


class _Source:
    """An open source file.

    Attributes:
        file: Its path as ranges name it.
        fd: Its descriptor.
        following: The range that will be wanted after the present one.
    """

    def __init__(self, file: Path, real: Path) -> None:
        self.file = file
        self.following: ByteRange | None = None
        self.fd = os.open(real, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.sparse = is_sparse(os.fstat(self.fd))
        self._announced = 0

    def announce(self, offset: int, end: int) -> None:
        """Have the system read what comes next, so that the disk works while bytes are copied and hashed.

        Args:
            offset: Where the next bytes are wanted.
            end: The end of the present range; the start of the following one is announced, too, when it is near.
        """
        self._announce(offset, min(end, offset + AHEAD_BYTES))
        left = offset + AHEAD_BYTES - end
        if left > 0 and self.following is not None:
            self._announce(self.following.start, min(self.following.end, self.following.start + left))

    def _announce(self, start: int, end: int) -> None:
        start = max(start, self._announced)
        if start < end and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, start, end - start, os.POSIX_FADV_WILLNEED)
            self._announced = end

    def segments(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Start, end and whether it is stored, of each part of a range."""
        yield from segments(self.fd, start, end) if self.sparse else [(start, end, True)]


def is_sparse(status: os.stat_result) -> bool:
    """Whether a file may have holes: it takes less room than it has bytes."""
    return hasattr(os, "SEEK_HOLE") and status.st_blocks * 512 < status.st_size


def segments(fd: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Parts of a range of an open file that are stored (True), and its holes (False), in order."""
    while start < end:
        try:
            data = min(end, os.lseek(fd, start, os.SEEK_DATA))
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data from here on
                raise
            data = end
        if data > start:
            yield start, data, False
        if data < end:
            hole = min(end, os.lseek(fd, data, os.SEEK_HOLE))
            yield data, hole, True
            data = hole
        start = data


def hash_file(path: Path, *, progress: Progress) -> str:
    """XXH3-128 of a file, in hexadecimal; holes are not read."""
    digest, buffer, zeros = xxhash.xxh3_128(), memoryview(bytearray(BUFFER_BYTES)), memoryview(bytes(BUFFER_BYTES))
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        status = os.fstat(fd)
        whole = [(0, status.st_size, True)]
        for start, end, stored in segments(fd, 0, status.st_size) if is_sparse(status) else whole:
            while start < end:
                count = min(BUFFER_BYTES, end - start)
                if stored and (count := os.preadv(fd, [buffer[:count]], start)) == 0:
                    break  # shorter than it was a moment ago: the hash will not match
                digest.update((buffer if stored else zeros)[:count])
                start += count
                progress(count)
    finally:
        os.close(fd)
    return digest.hexdigest()


def joined(ranges: Iterable[ByteRange]) -> Iterator[ByteRange]:
    """Neighbouring ranges as one: experts that stay side by side are copied in one go."""
    pending: ByteRange | None = None
    for item in ranges:
        if pending is not None and pending.file == item.file and pending.end == item.start:
            pending = ByteRange(pending.file, pending.start, item.end)
            continue
        if pending is not None:
            yield pending
        pending = item
    if pending is not None:
        yield pending


def _batched(ranges: Iterable[ByteRange]) -> Iterator[list[ByteRange]]:
    """Single large ranges, and runs of small ones that lie near each other."""
    batch: list[ByteRange] = []
    for piece in ranges:
        small = piece.end - piece.start < SMALL_BYTES
        near = (
            batch
            and piece.file == batch[-1].file
            and 0 <= piece.start - batch[-1].end < SMALL_BYTES
            and piece.end - batch[0].start <= WINDOW_BYTES
        )
        if batch and not (small and near):
            yield batch
            batch = []
        if small:
            batch.append(piece)
        else:
            yield [piece]
    if batch:
        yield batch


def _with_next(batches: Iterable[list[ByteRange]]) -> Iterator[tuple[list[ByteRange], list[ByteRange] | None]]:
    before: list[ByteRange] | None = None
    for batch in batches:
        if before is not None:
            yield before, batch
        before = batch
    if before is not None:
        yield before, None


def _too_short(piece: ByteRange, offset: int) -> ExportError:
    return ExportError(f"{piece.file}: ends at byte {offset}, expected {piece.end}. Did another program write to it?")
