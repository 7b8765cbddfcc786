import json

import pytest

from moeprune.files import (
    MAX_JSON_BYTES,
    parse_json,
    read_json,
    replacing,
    sha256_file,
    sha256_json,
    shorten,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_block_that_raises_leaves_no_file(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "out.json") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert names(tmp_path) == []


def test_a_block_that_raises_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "out.json", "old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "out.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out.json"]
    assert (tmp_path / "out.json").read_text() == "old"


def test_nothing_has_the_final_name_before_the_end(tmp_path):
    with replacing(tmp_path / "a" / "b" / "out.json") as temporary:
        temporary.write_text("whole")
        assert temporary.parent == tmp_path / "a" / "b", "a rename across file systems is not one step"
        assert not (tmp_path / "a" / "b" / "out.json").exists()
    assert names(tmp_path / "a" / "b") == ["out.json"]
    assert (tmp_path / "a" / "b" / "out.json").read_text() == "whole"


def test_a_block_that_writes_nothing_fails(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "out.json"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1.0, float("-inf")]}])
def test_json_with_a_number_that_json_does_not_have_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "out.json", value)
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        sha256_json(value)


def test_json_is_written_for_people_and_read_back(tmp_path):
    value = {"größe": [1, 2.5, None, True]}
    write_json(tmp_path / "out.json", value)
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "größe": [\n') and text.endswith("}\n")
    assert read_json(tmp_path / "out.json") == value
    (tmp_path / "out.json").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        read_json(tmp_path / "out.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' is given more than once"),
        ('[{"x": {"": 1, "": 2}}]', "the key '' is given more than once"),
        ("[" * 50_000, "nested too deeply"),
        ('"\\ud800"', "surrogates not allowed"),
        ('{"\\uDC00": 1}', "surrogates not allowed"),
        ("\ufeff{}", "Unexpected UTF-8 BOM"),
        ("9" * 5000, "4300 digits"),
    ],
)
def test_json_that_readers_understand_differently_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text.encode())


def test_numbers_that_json_does_not_have_are_read_unless_they_must_not_be():
    assert parse_json(b"[Infinity, -Infinity, 1e999, 1.5]") == [float("inf"), -float("inf"), float("inf"), 1.5]
    for text in (b"[NaN]", b"[Infinity]", b"[-Infinity]", b"[1e999]", b"[-1e999]"):
        with pytest.raises(ValueError, match="is not a number that JSON has"):
            parse_json(text, allow_nan=False)
    assert parse_json(b"[1e308, -0, 0]", allow_nan=False) == [1e308, 0, 0]


def test_whole_surrogate_pairs_are_read():
    assert parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_a_file_too_large_for_json_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="100000001 bytes, expected at most 100000000"):
        read_json(path)


def test_values_are_shortened_whatever_they_are():
    deep: list = []
    for _ in range(500):
        deep = [deep]
    for value in ("x" * 10**6, list(range(10**5)), dict.fromkeys(range(10**4)), 10**4000, deep):
        assert len(shorten(value)) < 400
    assert shorten({"a": [1, "b"]}) == "{'a': [1, 'b']}"


def test_hashes(tmp_path):
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "empty").touch()
    assert sha256_file(tmp_path / "empty") == empty
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 1, "b": 3})
