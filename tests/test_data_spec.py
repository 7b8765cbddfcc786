"""``[DOMAIN=]SOURCE[?key=value&...]`` as written on the command line."""

import pytest

from moeprune.data_spec import DataSpec, expand_demo, parse_data_spec
from moeprune.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("code.jsonl", {"source": "code.jsonl"}),
        ("mine=code.jsonl", {"source": "code.jsonl", "domain": "mine"}),
        ("org/set", {"source": "org/set"}),
        (
            "math=org/set?subset=main&split=test&tokens=65536&column=question",
            {
                "source": "org/set", "domain": "math", "subset": "main", "split": "test", "tokens": 65536,
                "column": "question",
            },
        ),
        (
            "org/set?prompt=q&response=a&documents=25&drop=tools,reasoning",
            {"source": "org/set", "prompt": "q", "response": "a", "documents": 25, "drop": ("tools", "reasoning")},
        ),
        ("org/set?split=train[:10%25]", {"source": "org/set", "split": "train[:10%]"}),
        ("mine=runs/lr=0.1/out.jsonl", {"source": "runs/lr=0.1/out.jsonl", "domain": "mine"}),
        ("demo", {"source": "demo"}),
    ],
)  # fmt: skip
def test_what_is_written_is_what_is_meant(text, expected):
    assert parse_data_spec(text) == DataSpec(**expected)


@pytest.mark.parametrize(
    ("text", "name"), [("folder/code.jsonl", "code"), ("org/set", "set"), ("mine=org/set", "mine"), ("notes", "notes")]
)
def test_the_name_of_a_domain(text, name):
    assert parse_data_spec(text).name == name


def test_the_column_option_is_for_specs_that_name_none():
    assert parse_data_spec("a.jsonl", column="body").column == "body"
    assert parse_data_spec("a.jsonl?column=text", column="body").column == "text"
    assert parse_data_spec("a.jsonl?prompt=question", column="body").column is None


KNOWN = (
    "Known: column, documents, drop, files, ids, min_tokens, prompt, response, share, split, subset, text, tokens, "
    "tool_calls, tools."
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a?splt=test", f"unknown key 'splt'. Did you mean 'split'? {KNOWN}"),
        ("a?zzz=1&yyy=2", f"unknown key 'yyy'. {KNOWN}"),
        ("a?column=x&prompt=y", "give one of prompt and column."),
        ("a?response=y", "response and tool_calls go with a prompt."),
        ("a?tokens=5&share=0.5", "give tokens or share, not both."),
        ("a?drop=tools,thoughts", "drop.1: Input should be 'tools' or 'reasoning'."),
        ("a?tokens=many", "tokens: Input should be a valid integer, unable to parse string as an integer."),
        ("a?tokens=0", "tokens: Input should be greater than 0."),
        ("mine=", "source: String should have at least 1 character."),
        ("", "source: String should have at least 1 character."),
    ],
)
def test_refused_specs(text, message):
    with pytest.raises(DataError) as error:
        parse_data_spec(text)
    assert str(error.value) == f"--data {text}: {message}"


@pytest.mark.parametrize("key", ["domain", "source"])
def test_a_name_after_the_question_mark_is_not_silently_dropped(key):
    with pytest.raises(DataError, match=f"unknown key '{key}'"):
        parse_data_spec(f"a.jsonl?{key}=code")


def test_demo_stands_for_every_calibration_file_of_the_embedded_model():
    specs = expand_demo([DataSpec(source="demo", tokens=100)])
    assert [spec.name for spec in specs] == sorted(spec.name for spec in specs)
    assert {"english", "python", "arithmetic"} <= {spec.name for spec in specs}
    assert all(spec.tokens == 100 and spec.local_format == "json" for spec in specs)


def test_one_domain_of_the_demo():
    (plain,) = expand_demo([DataSpec(source="demo/python")])
    assert plain.name == "python" and plain.local_format == "json"
    (named,) = expand_demo([DataSpec(source="demo/python", domain="code")])
    assert named.name == "code" and named.source == plain.source


def test_an_unknown_domain_of_the_demo():
    with pytest.raises(DataError, match=r"^demo/pyton: no such text\. Did you mean 'python'\? Known: arithmetic, "):
        expand_demo([DataSpec(source="demo/pyton")])


def test_files_in_a_folder_called_demo_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "own.jsonl").touch()
    specs = [DataSpec(source=source) for source in ("demo/own.jsonl", "org/demo")]
    assert expand_demo(specs) == tuple(specs)


def test_paths_with_an_equals_sign_and_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "day=1").mkdir()
    (tmp_path / "day=1" / "a.jsonl").touch()
    assert parse_data_spec("day=1/a.jsonl").source == "day=1/a.jsonl"
    assert parse_data_spec(f"{tmp_path}/day=2/a.jsonl").domain == ""
    assert parse_data_spec("code=~/a.jsonl").source == str(tmp_path / "a.jsonl")
