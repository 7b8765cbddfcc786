"""Files: written so that a killed run never leaves half of one under its final name, JSON read without guessing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from moeprune.errors import ExportError

MAX_JSON_BYTES = 100_000_000  # the index of a model with a million tensors; what is larger is something else
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; rename it to ``path`` when the block ends well.

    Args:
        path: The final file. Its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def why_not_writable(path: Path) -> str | None:
    """Why the system would not let a file be made at ``path``, its folders included; None if it would. Makes none."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other exports from writing to an existing folder or file; the system ends this when the process ends.

    Raises:
        ExportError: If another process writes there.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        try:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExportError(f"{path}: another export writes there. Wait for it, or choose another --out.") from error
        except (ImportError, OSError):  # a system or a file system without locks
            pass
        yield
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step (UTF-8)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, allow_nan: bool = False) -> None:
    """Write ``value`` to ``path`` in one step, indented as the field writes its JSON.

    Args:
        path: The final file.
        value: What to write.
        allow_nan: Write numbers that JSON does not have as Python does (``Infinity``, ``NaN``) instead of refusing
            them: for a file that had them before and whose readers know them, such as the config.json of Nemotron-H.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n")


def read_json(path: Path, *, allow_nan: bool = True) -> Any:
    """The JSON value in ``path``, as :func:`parse_json` reads it.

    Raises:
        ValueError: If the file is not JSON, or larger than :data:`MAX_JSON_BYTES`.
        OSError: If it cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{size} bytes, expected at most {MAX_JSON_BYTES}")
    return parse_json(path.read_bytes(), allow_nan=allow_nan)


def parse_json(data: bytes, *, allow_nan: bool = True) -> Any:
    """The JSON value that ``data`` spells in UTF-8, if it has exactly one meaning.

    Stricter than :func:`json.loads`: a key that stands twice in an object is refused, because readers differ in which
    value they take, and so is half a surrogate pair, which cannot be written again. ``-0`` is the number that JSON
    means, a float.

    Args:
        data: The bytes of a file.
        allow_nan: Take ``NaN`` and ``Infinity``, which Python writes and JSON does not have, and numbers too large for
            a float.

    Raises:
        ValueError: If it is anything else (also :class:`json.JSONDecodeError` and :class:`UnicodeDecodeError`).
    """
    text = data.decode("utf-8")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_repetition,
            parse_int=_integer,
            parse_constant=float if allow_nan else _no_number,
            parse_float=float if allow_nan else _finite,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if SURROGATE.search(text):  # most are whole pairs
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shorten(key)} is given more than once")
    return value


def _integer(text: str) -> int | float:
    return int(text) if text != "-0" else -0.0


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number that JSON has")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(shorten(text))


def shorten(value: Any) -> str:
    """``repr`` of a value from a file, cut where it would fill the screen."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 160
    short.maxlist = short.maxdict = 8
    return short.repr(value)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
