"""Files that only look like safetensors: refused as the safetensors library refuses them, and where it guesses, too."""

from __future__ import annotations

import json
import re
import struct
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize, safe_open

from moeprune.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, read_header
from moeprune.errors import CheckpointError

A = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'


def raw(header: str | bytes, data: int = 0) -> bytes:
    header = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(header)) + header + bytes(range(data))


def write(folder: Path, content: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    return str(error.value)


def entry(dtype: Any, shape: Any, offsets: Any) -> str:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


BOTH_REFUSE = {
    "an empty file": b"",
    "a file of zeros": bytes(64),
    "a header of no bytes": raw(""),
    "a header of spaces": raw("        "),
    "a byte order mark": raw(b"\xef\xbb\xbf{}"),
    "UTF-16": raw("{}".encode("utf-16")),
    "bytes that are no UTF-8": raw(b'{"\xff":{' + A.encode() + b"}}", 8),
    "half a surrogate pair": raw('{"\\ud800":{' + A + "}}", 8),
    "a control character in a name": raw('{"a\n":{' + A + "}}", 8),
    "text after the object": raw("{} x"),
    "a NUL after the object": raw("{}\0"),
    "two objects": raw("{}{}"),
    "an array": raw("[]"),
    "a missing brace": raw('{"a":{' + A + "}", 8),
    "a comma too many": raw('{"a":{' + A + ",}}", 8),
    "single quotes": raw("{'a':{}}"),
    "100000 brackets": raw("[" * 100_000),
    "100000 objects": raw('{"a":' * 100_000),
    "NaN as a size": raw('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', 8),
    "Infinity as a size": raw('{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', 8),
    "NaN where it does not matter": raw('{"a":{' + A + ',"x":NaN}}', 8),
    "a number too large where it does not matter": raw('{"a":{' + A + ',"x":1e999}}', 8),
    "a field given twice": raw('{"a":{"dtype":"F32",' + A + "}}", 8),
    "metadata given twice": raw('{"__metadata__":{},"__metadata__":{}}'),
    "metadata that is an array": raw('{"__metadata__":[]}'),
    "metadata that is a text": raw('{"__metadata__":""}'),
    "metadata that is false": raw('{"__metadata__":false}'),
    "metadata with a number": raw('{"__metadata__":{"a":1}}'),
    "metadata with nothing": raw('{"__metadata__":{"a":null}}'),
    "a tensor called __metadata__": raw('{"__metadata__":{' + A + "}}", 8),
    "an entry that is a number": raw('{"a":1}'),
    "an entry that is nothing": raw('{"a":null}'),
    "no dtype": raw('{"a":{"shape":[2],"data_offsets":[0,8]}}', 8),
    "no shape": raw('{"a":{"dtype":"F32","data_offsets":[0,8]}}', 8),
    "no offsets": raw('{"a":{"dtype":"F32","shape":[2]}}', 8),
    "a dtype from the future": raw(entry("F2", [32], [0, 8]), 8),
    "a dtype in lower case": raw(entry("f32", [2], [0, 8]), 8),
    "a dtype that is an array": raw(entry(["F32"], [2], [0, 8]), 8),
    "a dtype that is nothing": raw(entry(None, [2], [0, 8]), 8),
    "a shape that is a text": raw(entry("F32", "2", [0, 8]), 8),
    "a shape that is an object": raw(entry("F32", {"2": 1}, [0, 8]), 8),
    "a size that is a text": raw(entry("F32", ["2"], [0, 8]), 8),
    "a size that is a float": raw(entry("F32", [2.0], [0, 8]), 8),
    "a size that is a fraction": raw(entry("F32", [2.5], [0, 8]), 8),
    "a size that is true": raw(entry("F32", [2, True], [0, 8]), 8),
    "a size in powers of ten": raw('{"a":{"dtype":"U8","shape":[1e1],"data_offsets":[0,10]}}', 10),
    "a negative size": raw(entry("F32", [-1, -2], [0, 8]), 8),
    "minus zero as an offset": raw('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', 8),
    "a negative offset": raw(entry("F32", [2], [-8, 0]), 8),
    "an offset that is true": raw(entry("U8", [1], [0, True]), 1),
    "offsets that are an object": raw(entry("F32", [2], {"0": 8}), 8),
    "one offset": raw(entry("F32", [2], [8]), 8),
    "three offsets": raw(entry("F32", [2], [0, 8, 8]), 8),
    "offsets the other way round": raw(entry("F32", [2], [8, 0]), 8),
    "a size of 65 bits": raw(entry("F32", [0, 2**64], [0, 0])),
    "a size of 5000 digits": raw('{"a":{"dtype":"F32","shape":[0,' + "9" * 5000 + '],"data_offsets":[0,0]}}'),
    "sizes whose product is 2^65, undone by a zero": raw(entry("U8", [2**63, 4, 0], [0, 0])),
    "sizes whose product wraps round to 8 bytes": raw(entry("U8", [2**63 + 4, 2], [0, 8]), 8),
    "more than 2^64 bits": raw(entry("F64", [2**60], [0, 2**63]), 8),
    "half a byte": raw(entry("F4", [3], [0, 2]), 2),
    "six bits": raw(entry("F6_E2M3", [1], [0, 1]), 1),
    "too few bytes": raw(entry("F32", [3], [0, 8]), 8),
    "too many bytes": raw(entry("F32", [1], [0, 8]), 8),
    "a hole before the first tensor": raw(entry("F32", [2], [4, 12]), 12),
    "a hole between two": raw('{"a":{' + A + '},"b":{"dtype":"U8","shape":[1],"data_offsets":[9,10]}}', 10),
    "a hole before an empty tensor": raw('{"a":{' + A + '},"b":{"dtype":"U8","shape":[0],"data_offsets":[9,9]}}', 9),
    "bytes after the last tensor": raw(entry("F32", [2], [0, 8]), 9),
    "bytes after no tensor": raw("{}", 8),
    "an overlap": raw('{"a":{' + A + '},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}', 8),
    "one tensor under two names": raw('{"a":{' + A + '},"b":{' + A + "}}", 8),
    "an empty tensor inside another": raw('{"a":{' + A + '},"b":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}', 8),
    "a missing last byte": raw(entry("F32", [2], [0, 8]), 7),
    "an offset far beyond the file": raw(entry("U8", [2**40], [0, 2**40]), 8),
}


@pytest.mark.parametrize("content", BOTH_REFUSE.values(), ids=list(BOTH_REFUSE))
def test_what_the_library_refuses_is_refused(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(SafetensorError):
        deserialize(content)
    with pytest.raises(SafetensorError), safe_open(path, "numpy"):
        pass
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert len(message) < len(str(path)) + 700, "a message is for people, however long the file's names are"


BOTH_READ = {
    "no tensor": raw("{}"),
    "metadata alone": raw('{"__metadata__":{"format":"pt"}}'),
    "metadata that is null": raw('{"__metadata__":null}'),
    "white space all around": raw(' \n{"a" : {' + A + "}}\t\r ", 8),
    "a field more": raw('{"a":{' + A + ',"x":[1.5,null,{"y":-0}]}}', 8),
    "fields in another order": raw('{"a":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}', 8),
    "a scalar": raw(entry("F64", [], [0, 8]), 8),
    "an empty tensor": raw(entry("F64", [0, 2**63, 7], [0, 0])),
    "an empty tensor of 2^65 bits but for a zero": raw(entry("F32", [2**60, 0], [0, 0])),
    "empty tensors before, between and after": raw(
        '{"z":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"y":{"dtype":"U8","shape":[0,3],"data_offsets":[8,8]},'
        '"a":{' + A + '},"x":{"dtype":"U8","shape":[2],"data_offsets":[8,10]},'
        '"w":{"dtype":"F4","shape":[0],"data_offsets":[10,10]}}', 10
    ),
    "names out of order": raw('{"b":{"dtype":"U8","shape":[2],"data_offsets":[8,10]},"a":{' + A + "}}", 10),
    "an empty name": raw('{"":{' + A + "}}", 8),
    "names with NUL, slashes and dots": raw('{"../\\u0000/etc":{' + A + "}}", 8),
    "names that differ in case": raw('{"w":{' + A + '},"W":{"dtype":"U8","shape":[1],"data_offsets":[8,9]}}', 9),
    "a whole surrogate pair": raw('{"\\ud83d\\ude00 \U0001f600 ü":{' + A + "}}", 8),
    "two elements in a byte": raw(entry("F4", [3, 2], [0, 3]), 3),
}  # fmt: skip


def as_the_library_reads(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    stored = {name: (e["dtype"], e["shape"], bytes(e["data"])) for name, e in deserialize(path.read_bytes())}
    with safe_open(path, "numpy") as file:
        opened = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        assert {k: (s.get_dtype(), s.get_shape()) for k, s in opened.items()} == {
            k: (dtype, shape) for k, (dtype, shape, _) in stored.items()
        }
    return stored


@pytest.mark.parametrize("content", BOTH_READ.values(), ids=list(BOTH_READ))
def test_what_the_library_reads_is_read_as_the_same(tmp_path, content):
    path = write(tmp_path, content)
    tensors, metadata = read_header(path)
    assert {t.name: (t.dtype, list(t.shape), content[t.start : t.end]) for t in tensors.values()} == (
        as_the_library_reads(path)
    )
    with safe_open(path, "numpy") as file:
        assert metadata == (file.metadata() or {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw('{"a":{' + A + '},"a":{' + A + "}}", 8), "not JSON (the key 'a' is given more than once)."),
        (raw('{"__metadata__":{"k":"1","k":"2"}}'), "not JSON (the key 'k' is given more than once)."),
        (raw('{"a":["F32",[2],[0,8]]}', 8), "the header entry of 'a' is malformed: ['F32', [2], [0, 8]]."),
        (
            raw('{"a":{"dtype":{"F32":null},"shape":[2],"data_offsets":[0,8]}}', 8),
            "the header entry of 'a' is malformed: "
            "{'data_offsets': [0, 8], 'dtype': {'F32': None}, 'shape': [2]}.",
        ),
    ],
)  # fmt: skip
def test_what_the_library_takes_by_guessing_is_refused(tmp_path, content, message):
    path = write(tmp_path, content)
    deserialize(content)
    assert refusal(path).endswith(message)


def test_the_dtypes_are_those_of_the_installed_library(tmp_path):
    with pytest.raises(SafetensorError) as error:
        deserialize(raw(entry("none", [2], [0, 8]), 8))
    assert set(re.findall("`([A-Z][A-Z0-9_]+)`", str(error.value))) == set(DTYPE_BITS)


def test_a_hole_is_named_with_its_bytes(tmp_path):
    path = write(tmp_path, raw(entry("F32", [2], [4, 12]), 12))
    begin = path.stat().st_size - 12
    assert refusal(path) == f"{path}: bytes {begin} to {begin + 4} before tensor 'a' belong to no tensor."


def test_bytes_after_the_last_tensor_are_named(tmp_path):
    path = write(tmp_path, raw(entry("F32", [2], [0, 8]), 9))
    size = path.stat().st_size
    assert refusal(path) == f"{path}: its tensors end at byte {size - 1}, the file at {size}. Download it again."


@pytest.mark.parametrize("length", [2 << 30, 1 << 63, (1 << 64) - 1])
def test_a_length_beyond_the_file_allocates_nothing(tmp_path, length):
    path = write(tmp_path, struct.pack("<Q", length) + b"{}")
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message == f"{path}: not a complete safetensors file (10 bytes, header length {length}). Download it again."
    assert peak < 1 << 20


def test_a_header_of_2_gb_is_refused_without_reading_it(tmp_path):
    path = write(tmp_path, struct.pack("<Q", 2 << 30))
    with path.open("r+b") as file:
        file.truncate((2 << 30) + 64)  # sparse: it takes no space
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message == (
        f"{path}: has a header of {2 << 30} bytes; the safetensors library reads at most {MAX_HEADER_BYTES}."
    )
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04\x00\x00\x08\x08 archive/data.pkl", "a pickle, which can run code"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a pickle, which can run code"),
        (b"GGUF\x03\x00\x00\x00\x01\x00\x00\x00", "a GGUF file"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, content, what):
    assert f"not safetensors but {what}" in refusal(write(tmp_path, content))


@pytest.mark.parametrize("length", [0x0280, 0x213C])
def test_a_header_whose_length_looks_like_another_format_is_read(tmp_path, length):
    """640 bytes are spelt like the first bytes of a pickle, 8508 like those of a web page."""
    header = b'{"a":{' + A.encode() + b"}}"
    path = write(tmp_path, raw(header.ljust(length), 8))
    assert path.read_bytes()[:2] in (b"\x80\x02", b"<!")
    assert read_header(path)[0].keys() == {"a"}


def test_a_long_name_does_not_fill_the_screen(tmp_path):
    path = write(tmp_path, raw(json.dumps({"n" * 1_000_000: {"dtype": "x" * 1_000_000}})))
    assert len(refusal(path)) < len(str(path)) + 700


def test_deep_nesting_where_it_does_not_matter_is_no_crash(tmp_path):
    path = write(tmp_path, raw('{"a":{' + A + ',"x":' + "[" * 50_000 + "]" * 50_000 + "}}", 8))
    assert refusal(path) == f"{path}: the safetensors header is not JSON (nested too deeply)."


def test_a_folder_and_a_missing_file(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read (Is a directory)."
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: cannot be read (No such file or directory)."


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    content = raw(entry("F32", [2], [0, 8]), 8)
    path = write(tmp_path, content[:20])
    monkeypatch.setattr("moeprune.checkpoint.header.os.fstat", lambda _: SimpleNamespace(st_size=len(content)))
    assert f": not a complete safetensors file ({len(content)} bytes, " in refusal(path)
