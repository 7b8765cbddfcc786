"""Whatever bytes a file holds, it is either read as the libraries read it or refused with an error made for people."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from moeprune.checkpoint.folder import Checkpoint, open_checkpoint, read_config
from moeprune.checkpoint.header import DTYPE_BITS, encode_header, read_header
from moeprune.errors import CheckpointError, PlanError
from moeprune.files import parse_json, read_json, write_json
from moeprune.plan.plan import LayerPlan, Plan
from tests.fake_stats import facts

INDEX = "model.safetensors.index.json"

bounded = settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)

NUMBERS = st.one_of(
    st.integers(0, 40),
    st.sampled_from([-1, 2**31, 2**32, 2**63, 2**64, 2**64 - 1, 2**70, True, False, 1.0, 0.5, -0.0, 1e308]),
)
TEXTS = st.one_of(st.text(max_size=4), st.sampled_from(["a", "w", "dtype", "__metadata__", "F32", "U8", "\0", "../x"]))
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*DTYPE_BITS, "F31"]),
            "shape": st.lists(st.one_of(st.integers(0, 3), NUMBERS), max_size=3),
            "data_offsets": st.lists(st.one_of(st.integers(0, 16), NUMBERS), min_size=1, max_size=3),
        },
        optional={"extra": JSON},
    ),
    JSON,
)
HEADERS = st.dictionaries(TEXTS, ENTRIES, max_size=3) | JSON


@st.composite
def valid_files(draw: st.DrawFn) -> bytes:
    layout, data = [], 0
    for name in draw(st.lists(TEXTS.filter(lambda text: text != "__metadata__"), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        if prod(shape) * DTYPE_BITS[dtype] % 8 == 0:
            layout.append((name, dtype, shape, prod(shape) * DTYPE_BITS[dtype] // 8))
            data += layout[-1][3]
    metadata = draw(st.dictionaries(TEXTS, TEXTS, max_size=2))
    return encode_header(layout, metadata) + draw(st.binary(min_size=data, max_size=data))


INSERTED = [b"-", b"0", b'"', b"\\ud800", b"\xff", b" ", b"[", b"}", b",", b"e9", b".0", b"true", b"9" * 20]


def spell(number: int, rng: random.Random) -> str:
    """The number, or one near it, in a way that JSON allows."""
    near = [number + 1, number + 8, abs(number - 1), 2 * number, 2**64 + number, 2**63 * number]
    return rng.choice([f"-{number}", "true", f"{number}.0", f"{number}e0", f'"{number}"', *map(str, near)])


def damage_numbers(content: bytearray, rng: random.Random) -> None:
    """Spell a size or an offset in another way, or move all tensors from some byte on and leave a hole."""
    numbers = list(re.finditer(rb"(?<=[\[,])\d+(?=[\],])", content))
    if not numbers:
        return
    if rng.random() < 0.7:
        match = rng.choice(numbers)
        content[match.start() : match.end()] = spell(int(match.group()), rng).encode()
        return
    length = struct.unpack("<Q", content[:8])[0]
    header, hole = json.loads(content[8 : 8 + length]), rng.randrange(1, 9)
    entries = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    first = rng.choice(entries)[0]
    for offsets in entries:
        offsets[:] = [n + hole * (offsets[0] >= first) for n in offsets]
    text = json.dumps(header).encode()
    data = content[8 + length :]
    content[:] = struct.pack("<Q", len(text)) + text + data[:first] + bytes(hole) + data[first:]


def damage(content: bytearray, rng: random.Random) -> None:
    """Change, remove, double, swap or insert some bytes."""
    at, other = rng.randrange(len(content)), rng.randrange(len(content))
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()] or [at]
    match rng.randrange(7):
        case 0:
            content[at] ^= 1 << rng.randrange(8)
        case 1:
            content[rng.choice(digits)] = ord("0") + rng.randrange(10)
        case 2:
            del content[max(at, 1) :]
        case 3 if len(content) > 9:
            del content[at : at + rng.randrange(1, 9)]
        case 4:
            content[at:at] = content[at : at + rng.randrange(1, 60)]
        case 5:
            content[at], content[other] = content[other], content[at]
        case _:
            where = rng.choice([at, rng.choice(digits)])
            content[where:where] = rng.choice(INSERTED)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A valid file with a number or some bytes damaged; often the length of the header is then made to fit again."""
    content = bytearray(draw(valid_files()))
    rng = random.Random(draw(st.integers(0, 2**32)))
    if rng.random() < 0.5:
        damage_numbers(content, rng)
    else:
        for _ in range(rng.randint(1, 3)):
            damage(content, rng)
    if rng.random() < 0.6 and len(content) > 8:
        content[:8] = struct.pack("<Q", max(content.rfind(b"}") + 1 - 8, 0))
    return bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@contextmanager
def library_refuses() -> Iterator[list[str]]:
    reasons: list[str] = []
    try:
        yield reasons
    except SafetensorError as error:
        reasons.append(str(error))


def has_one_meaning(content: bytes) -> bool:
    """Whether the header is spelt as the format is documented: no key twice, an entry an object, a dtype a text."""
    length = struct.unpack("<Q", content[:8])[0]
    repeated = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.append(len({key for key, _ in items}) < len(items))
        return dict(items)

    header = json.loads(content[8 : 8 + length], object_pairs_hook=pairs)
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return not any(repeated) and all(isinstance(e, dict) and isinstance(e["dtype"], str) for e in entries)


def judge(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with library_refuses() as reasons:
        stored = {name: (e["dtype"], e["shape"], bytes(e["data"])) for name, e in deserialize(content)}
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    try:
        found, found_metadata = read_header(path)
    except CheckpointError as error:
        assert reasons or not has_one_meaning(content), f"the library reads this; we say: {error}"
        assert len(str(error)) < len(str(path)) + 700
        return
    assert not reasons, f"the library refuses this: {reasons}"
    assert {t.name: (t.dtype, list(t.shape), content[t.start : t.end]) for t in found.values()} == stored
    assert found_metadata == metadata


@bounded
@given(content=st.binary(max_size=64) | HEADERS.map(lambda header: with_length(json.dumps(header).encode())))
def test_random_bytes_and_random_json(folder, content):
    judge(folder / "x.safetensors", content)


def with_length(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@bounded
@given(header=HEADERS, data=st.integers(0, 40))
def test_random_headers_over_data(folder, header, data):
    judge(folder / "x.safetensors", with_length(json.dumps(header).encode()) + bytes(data))


@settings(bounded, max_examples=600)
@given(content=damaged_files())
def test_damaged_files(folder, content):
    judge(folder / "x.safetensors", content)


@bounded
@given(content=valid_files())
def test_valid_files_are_read_by_both(folder, content):
    path = folder / "x.safetensors"
    path.write_bytes(content)
    read_header(path)
    judge(path, content)


# JSON files


JSON_BYTES = st.one_of(
    st.binary(max_size=40),
    JSON.map(lambda value: json.dumps(value).encode()),
    JSON.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [b"[" * 9999, b'{"a":' * 9999, b"9" * 5000, b"1e999", b"NaN", b'"\\ud800"', b'{"a":1,"a":1}', b"-0"]
    ),
)


@bounded
@given(content=JSON_BYTES)
def test_what_is_read_as_json_can_be_written_and_read_again(folder, content):
    path = folder / "x.json"
    path.write_bytes(content)
    try:
        value = read_json(path)
    except ValueError:
        return
    assert value == json.loads(content.decode()) or content == b"NaN"
    write_json(path, value, allow_nan=True)
    assert repr(read_json(path)) == repr(value)
    try:
        parse_json(content, allow_nan=False)
    except ValueError:
        return
    write_json(path, value)


@bounded
@given(content=JSON_BYTES)
def test_random_configs(folder, content):
    (folder / "config.json").write_bytes(content)
    try:
        assert isinstance(read_config(folder), dict)
    except CheckpointError as error:
        assert str(error).startswith(str(folder))


FILES = st.one_of(JSON, st.sampled_from(["a.safetensors", "b.safetensors", "../a.safetensors", "folder.safetensors"]))
INDEXES = st.fixed_dictionaries({"weight_map": st.one_of(JSON, st.dictionaries(TEXTS, FILES, max_size=4))})


@bounded
@given(content=st.one_of(JSON_BYTES, INDEXES.map(lambda value: json.dumps(value).encode())))
def test_random_indexes(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "indexed"
    if not folder.exists():
        (folder / "folder.safetensors").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        for name, key in [("a.safetensors", "a"), ("b.safetensors", "w")]:
            (folder / name).write_bytes(encode_header([(key, "U8", (3,), 3)], {}) + b"abc")
        (folder.parent / "a.safetensors").write_bytes(encode_header([], {}))
    (folder / INDEX).write_bytes(content)
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        assert str(error).startswith(str(folder))
        return
    assert isinstance(checkpoint, Checkpoint)
    assert all(shard.parent == folder for shard in checkpoint.shards)
    weight_map = json.loads(content)["weight_map"]
    assert {key: checkpoint.tensors[key].file.name for key in weight_map} == weight_map


# Plans


def a_plan() -> dict[str, Any]:
    keep = {"model.layers.1": (0, 2, 3, 9), "model.layers.2": (1, 4, 5, 8)}
    layers = tuple(LayerPlan(layer=name, keep=ids) for name, ids in keep.items())
    plan = Plan(model=facts(), num_experts=4, top_k=2, layers=layers, method={"score": "reap"}, warnings=("w",))
    return plan.model_dump(mode="json")


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


VALUES = st.one_of(
    st.sampled_from(
        [-1, 0, 1, 2, 3, 5, 10, 11, 2**31, 2**70, True, None, 1.0, float("nan"), float("inf"), "", "2", [], {}]
    ),
    st.lists(st.integers(-1, 10), max_size=5),
    JSON,
)


@st.composite
def edited_plans(draw: st.DrawFn) -> bytes:
    """A plan in which some values were replaced, removed, doubled or added, or a key is given twice."""
    plan = a_plan()
    for _ in range(draw(st.integers(0, 2))):
        *path, last = draw(st.sampled_from(list(places(plan))))
        target = plan
        for key in path:
            target = target[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "add", "double"])):
            case "replace":
                target[last] = draw(VALUES)
            case "remove":
                del target[last]
            case "add" if isinstance(target, dict):
                target[draw(TEXTS)] = draw(VALUES)
            case "double" if isinstance(target, list):
                target.append(target[last])
    text = json.dumps(plan)
    twice = draw(st.sampled_from([None, None, "top_k", "keep", "layers", "scale"]))
    return text.replace(f'"{twice}": ', f'"{twice}": null, "{twice}": ', 1).encode()


@settings(bounded, max_examples=400)
@given(content=edited_plans() | JSON_BYTES)
def test_random_plans(folder, content):
    path = folder / "plan.json"
    path.write_bytes(content)
    try:
        plan = Plan.load(path)
    except PlanError as error:
        assert len(str(error)) < len(str(path)) + 1000
        return
    assert not re.search(rb'"(top_k|keep|layers)": null, "', content), "a key given twice was read"
    assert len(plan.sha256) == 64
    assert plan.layers
    for keep in plan.keep.values():
        assert all(0 <= expert < plan.model.num_experts for expert in keep)
        assert len(set(keep)) == len(keep) == plan.num_experts >= plan.top_k >= 1
    plan.save(path)
    assert Plan.load(path) == plan


@bounded
@given(content=st.binary(max_size=200), at=st.integers(0, 10_000))
def test_plans_with_bytes_overwritten(folder, content, at):
    whole = json.dumps(a_plan()).encode()
    path = folder / "plan.json"
    at %= len(whole)
    path.write_bytes(whole[:at] + content + whole[at + len(content) :])
    try:
        Plan.load(path)
    except PlanError:
        return
    assert isinstance(json.loads(path.read_bytes()), dict)
