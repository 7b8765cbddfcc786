"""Which tensor goes into which file of the pruned checkpoint, and what each file begins with."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeprune.checkpoint.folder import SINGLE_NAME
from moeprune.checkpoint.header import MAX_HEADER_BYTES, encode_header
from moeprune.errors import ExportError
from moeprune.export.slices import ByteRange, OutputTensor

BLOCK_BYTES = 4096
WORTH_SHARING = 64 << 10
ALIGNMENT = 8
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Shard:
    """A safetensors file to write.

    Attributes:
        name: Its file name.
        header: Its first bytes; empty if it is ``untouched``.
        tensors: What follows, in this order.
        files: The source files that its bytes come from, in the order of their first use.
        untouched: The source file that it equals byte for byte, header included, if there is one.
    """

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    files: tuple[Path, ...]
    untouched: Path | None

    @property
    def data_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        if self.untouched is not None:
            return max(tensor.source.end for tensor in self.tensors)
        return len(self.header) + self.data_bytes

    def parts(self) -> Iterator[ByteRange | OutputTensor]:
        """What to append after the header: byte ranges, and tensors whose values are computed."""
        if self.untouched is not None:
            yield ByteRange(self.untouched, 0, self.num_bytes)
            return
        for tensor in self.tensors:
            yield from [tensor] if tensor.compute is not None else tensor.ranges()


def parse_size(text: str | int) -> int:
    """A number of bytes as transformers spells it.

    Args:
        text: ``5GB``, ``500MB`` (powers of 1000), ``5GiB`` (powers of 1024) or a number of bytes.

    Raises:
        ExportError: If it is anything else, or not above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip(), re.IGNORECASE)
    factor = UNITS.get(match[2].upper()) if match else None
    num_bytes = int(float(match[1]) * factor) if match and factor else 0
    if num_bytes < 1:
        raise ExportError(f"--max-shard-size {text}: expected a size such as 5GB, 500MB or 2GiB.")
    return num_bytes


def lay_out(
    outputs: Mapping[Path, Sequence[OutputTensor]],
    *,
    metadata: Mapping[str, Mapping[str, str]],
    tensors_in: Mapping[Path, int],
    max_bytes: int | None = None,
) -> tuple[Shard, ...]:
    """Distribute tensors over files, keeping their order.

    Args:
        outputs: Tensors by source file (:func:`moeprune.export.slices.plan_outputs`).
        metadata: ``__metadata__`` of each source file by name. A file made of several carries the keys of all, each
            with the first value met.
        tensors_in: Number of tensors that each source file holds.
        max_bytes: Begin a new file before a file's tensors would take more than this many bytes; a larger tensor gets a
            file of its own. None keeps the source's boundaries.

    Raises:
        ExportError: If a file would get a longer header than readers take.
    """
    groups = list(outputs.values()) if max_bytes is None else list(_filled(outputs.values(), max_bytes))
    shards = []
    for number, group in enumerate(groups, start=1):
        name = SINGLE_NAME if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        files = tuple(dict.fromkeys(tensor.source.file for tensor in group))
        untouched = files[0] if _is_untouched(group, files, tensors_in) else None
        merged = {key: value for file in reversed(files) for key, value in metadata[file.name].items()}
        header = b"" if untouched else _header(group, merged)
        if len(header) - 8 > MAX_HEADER_BYTES:
            raise ExportError(f"{name}: its header takes {len(header)} bytes. Lower --max-shard-size.")
        shards.append(Shard(name, header, tuple(group), files, untouched))
    return tuple(shards)


def bytes_by_source(shards: Iterable[Shard]) -> Counter[Path]:
    """Bytes that are copied out of each source file."""
    total: Counter[Path] = Counter()
    for shard in shards:
        for tensor in shard.tensors:
            total[tensor.source.file] += tensor.num_bytes
    return total


def _filled(groups: Iterable[Sequence[OutputTensor]], max_bytes: int) -> Iterator[list[OutputTensor]]:
    current: list[OutputTensor] = []
    size = 0
    for tensor in (tensor for group in groups for tensor in group):
        if current and size + tensor.num_bytes > max_bytes:
            yield current
            current, size = [], 0
        current.append(tensor)
        size += tensor.num_bytes
    yield current


def _is_untouched(group: Sequence[OutputTensor], files: Sequence[Path], tensors_in: Mapping[Path, int]) -> bool:
    return (
        len(files) == 1
        and len(group) == tensors_in[files[0]]
        and all(tensor.is_copy and tensor.name == tensor.source.name for tensor in group)
    )


def _header(tensors: Sequence[OutputTensor], metadata: dict[str, str]) -> bytes:
    """The encoded header, padded so that as many bytes as possible lie in their blocks as they do in the source's.

    File systems that share blocks between files can do so only where source and target agree on where a block begins.
    """
    header = encode_header(((t.name, t.source.dtype, t.shape, t.num_bytes) for t in tensors), metadata)
    spaces = (_favourite_phase(tensors, default=len(header)) - len(header)) % BLOCK_BYTES
    return struct.pack("<Q", len(header) - 8 + spaces) + header[8:] + b" " * spaces


def _favourite_phase(tensors: Sequence[OutputTensor], *, default: int) -> int:
    """Where in a block the data should begin: the multiple of 8 at which most bytes can be shared, if any can."""
    gains: Counter[int] = Counter()
    position = 0
    for tensor in tensors:
        offset = position
        for piece in () if tensor.compute is not None else tensor.ranges():
            length = piece.end - piece.start
            if length < WORTH_SHARING:
                break  # the pieces of a tensor are alike
            gains[(piece.start - offset) % BLOCK_BYTES] += length
            offset += length
        position += tensor.num_bytes
    return max((phase for phase in gains if phase % ALIGNMENT == 0), key=lambda phase: gains[phase], default=default)
