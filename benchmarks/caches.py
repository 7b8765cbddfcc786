"""The page cache: what of a file is in it, and how to put it in or out."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def files_of(folder: Path) -> list[Path]:
    """All files of a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def warm(files: Iterable[Path]) -> None:
    """Read files, so that they are in the cache as far as it has room."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 23):
                pass


def cool(files: Iterable[Path]) -> None:
    """Write out what is dirty and drop the files from the cache."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(files: Iterable[Path]) -> float:
    """Share of the files' pages that are in the cache, as mincore(2) says."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    resident = total = 0
    for path in files:
        size = path.stat().st_size
        if size == 0:
            continue
        pages = -(-size // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * pages)()
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view,
        ):
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
            if libc.mincore(address, size, vector):
                raise OSError(ctypes.get_errno(), "mincore")
        resident += sum(byte & 1 for byte in bytes(vector))
        total += pages
    return resident / total
