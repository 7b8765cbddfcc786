"""A model stored as GGUF: one file, or the parts that ``llama-gguf-split`` makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moeprune.errors import CheckpointError
from moeprune.gguf.header import GgufTensor, Header, KeyValue, read_header

SUFFIX = ".gguf"
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufFile:
    """A model as its headers describe it.

    Attributes:
        path: The file, or the first part.
        files: All parts, in order.
        version: Of the format.
        alignment: Tensor data starts at multiples of this many bytes.
        metadata: All entries by key, those of the first part (the others repeat only ``split.*``).
        tensors: All tensors by name, in order.
    """

    path: Path
    files: tuple[Path, ...]
    version: int
    alignment: int
    metadata: dict[str, KeyValue]
    tensors: dict[str, GgufTensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def text(self, key: str) -> str | None:
        """A string of the metadata; None if it is absent.

        Raises:
            CheckpointError: If it is not a string.
        """
        entry = self.metadata.get(key)
        if entry is None:
            return None
        if not isinstance(entry.value, str):
            raise CheckpointError(f"{self.path}: {key} is {entry.value!r}, expected text.")
        return entry.value

    def count(self, key: str) -> int | None:
        """A whole number of the metadata; None if it is absent.

        Raises:
            CheckpointError: If it is not a whole number of 0 or more.
        """
        entry = self.metadata.get(key)
        if entry is None:
            return None
        if not isinstance(entry.value, int) or isinstance(entry.value, bool) or entry.value < 0:
            raise CheckpointError(f"{self.path}: {key} is {entry.value!r}, expected a whole number.")
        return entry.value


def is_gguf(model: str | Path) -> bool:
    """Whether a model is given as the path of a GGUF file rather than as a folder or a Hub id."""
    return Path(model).suffix.lower() == SUFFIX


def open_gguf(path: str | Path) -> GgufFile:
    """Open a GGUF file by its header; of a split one, all parts.

    Args:
        path: The file, or any part of a split one.

    Raises:
        CheckpointError: If a file is missing or damaged, or the parts do not belong together.
        UnsupportedModelError: If a tensor has a type that the installed gguf package does not know.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file. Give a {SUFFIX} file; of a split model, its first part. One of the Hub must be "
            "downloaded first (hf download)."
        )
    header = read_header(path)
    if _split_count(path, header) > 1:
        files = _parts(path, header)
        headers = [header if file == path else read_header(file) for file in files]
        _check_parts(files, headers)
    else:
        files, headers = (path,), [header]
    tensors: dict[str, GgufTensor] = {}
    for file, part in zip(files, headers, strict=True):
        twice = tensors.keys() & {tensor.name for tensor in part.tensors}
        if twice:
            raise CheckpointError(f"{file}: tensor {min(twice)!r} is in an earlier part as well.")
        tensors |= {tensor.name: tensor for tensor in part.tensors}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors (a vocabulary only?). Give the file with the weights.")
    first = headers[0]
    return GgufFile(files[0], files, first.version, first.alignment, first.metadata, tensors)


def _split_count(path: Path, header: Header) -> int:
    entry = header.metadata.get("split.count")
    count = 1 if entry is None else entry.value
    if not isinstance(count, int):
        raise CheckpointError(f"{path}: split.count is {count!r}, expected a whole number.")
    return count  # llama-gguf-split --merge leaves a 0


def _parts(path: Path, header: Header) -> tuple[Path, ...]:
    count = _split_count(path, header)
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path}: one of {count} parts, so its name must end in -0000N-of-{count:05d}{SUFFIX}. Give the parts the "
            "names that llama-gguf-split gave them."
        )
    files = tuple(path.with_name(f"{match['stem']}-{n:05d}-of-{count:05d}{SUFFIX}") for n in range(1, count + 1))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {count} parts are missing, first {missing[0]}.")
    return files


def _check_parts(files: tuple[Path, ...], headers: list[Header]) -> None:
    total = sum(len(header.tensors) for header in headers)
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        expected = dict(zip(SPLIT_KEYS, (number, len(files), total), strict=True))
        for key, wanted in expected.items():
            entry = header.metadata.get(key)
            if entry is None or entry.value != wanted:
                found = None if entry is None else entry.value
                raise CheckpointError(
                    f"{file}: {key} is {found!r}, expected {wanted}: the parts are not of one model. Download them "
                    "again."
                )
