"""Chats with tools and reasoning, as published data sets hold them, through a template that uses all of it."""

import json
from pathlib import Path

import pytest

from moeprune.calibrate.text.documents import read_documents
from moeprune.data_spec import DataSpec
from moeprune.errors import DataError
from tests.calibrate.tokenizer import CHAT_TEMPLATE, FIRST_BYTE, byte_tokenizer

FULL = (
    "{% for t in tools or [] %}<tool {{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}"
    "<call {{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}>"
    "{% endfor %}{% endif %}{% endfor %}"
)


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(path: Path, *, template: str | None = FULL, **spec) -> list[str]:
    """The documents as text again, in the order of the file's ids."""
    tokenizer = byte_tokenizer(chat_template=template)
    documents = read_documents(DataSpec(source=str(path), **spec), tokenizer=tokenizer, seed=0)
    return sorted(bytes(token - FIRST_BYTE for token in document).decode() for document in documents)


def refused(path: Path, **options) -> str:
    with pytest.raises(DataError) as error:
        texts(path, **options)
    return str(error.value).removeprefix(f"{path}: ")


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
AGENT = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "use the tool"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "3."},
]
RENDERED = "<tool add>[user]1+2?[assistant]<think>use the tool</think><call add a=1 b=2>[tool]3[assistant]3."


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tools_calls_and_reasoning_are_rendered(tmp_path, suffix):
    """A table fills the fields that a message lacks with null, which templates take for given."""
    path = write(tmp_path / f"a{suffix}", [{"messages": AGENT, "tools": [TOOL]}])
    assert texts(path) == [RENDERED]


def test_messages_and_tools_as_json_text(tmp_path):
    """So SWE-smith's trajectories and xLAM's tools are stored."""
    path = write(tmp_path / "a.jsonl", [{"messages": json.dumps(AGENT), "tools": json.dumps([TOOL])}])
    assert texts(path) == [RENDERED]


def test_a_question_and_its_calls_in_columns(tmp_path):
    row = {
        "query": "1+2?", "answers": json.dumps([{"name": "add", "arguments": {"a": 1, "b": 2}}]),
        "tools": json.dumps([{"name": "add", "description": "adds"}]),
    }  # fmt: skip
    path = write(tmp_path / "a.jsonl", [row])
    assert texts(path, prompt="query", tool_calls="answers") == ["<tool add>[user]1+2?[assistant]<call add a=1 b=2>"]


@pytest.mark.parametrize(
    ("columns", "spec"),
    [
        (("prompt", "response"), {}), (("instruction", "output"), {}), (("question", "answer"), {}),
        (("ask", "say"), {"prompt": "ask", "response": "say"}),
    ],
)  # fmt: skip
def test_a_question_with_its_answer(tmp_path, columns, spec):
    path = write(tmp_path / "a.jsonl", [dict(zip(columns, ("why", "so"), strict=True))])
    assert texts(path, **spec) == ["[user]why[assistant]so"]


def test_parts_of_a_message_are_joined(tmp_path):
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": content}]}])
    assert texts(path) == ["[user]one\ntwo"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_given_under_the_name_that_the_template_reads(tmp_path, name):
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "so", name: "hm"}]}])
    assert texts(path) == ["[assistant]<think>hm</think>so"]


def test_reasoning_that_a_template_would_leave_out_is_refused_unless_it_is_dropped(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "so", "thinking": "hm"}]}])
    assert refused(path, template=CHAT_TEMPLATE) == (
        "messages hold 'thinking', and the model's chat template has no place for it. Leave it out with "
        "drop=reasoning, or write it into the content."
    )
    assert texts(path, template=CHAT_TEMPLATE, drop=("reasoning",)) == ["[assistant]so"]


def test_tools_that_a_template_would_leave_out_are_refused_unless_they_are_dropped(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": AGENT, "tools": [TOOL]}])
    assert refused(path, template=CHAT_TEMPLATE, drop=("reasoning",)) == (
        "the chats use tools, and the model's chat template has no place for them. Leave them out with drop=tools, or "
        "choose text without tools."
    )
    assert texts(path, template=CHAT_TEMPLATE, drop=("reasoning", "tools")) == [
        "[user]1+2?[assistant][tool]3[assistant]3."
    ]


def test_a_template_that_refuses_a_chat_says_why(tmp_path):
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "system", "content": "s"}]}])
    assert refused(path, template=template) == (
        "the model's chat template refuses a chat (roles system): begin with the user. Choose other text, or a column "
        "of plain text."
    )


def test_questions_without_a_chat_template_are_written_by_a_template_of_the_users(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+2", "response": "3"}])
    assert "the tokenizer has no chat template" in refused(path, template=None)
    assert texts(path, template=None, text="{{ prompt }} = {{ response }}") == ["1+2 = 3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ promt }}", "does not fit a row: 'promt' is undefined. Columns: prompt, response."),
        ("{{ prompt", "does not fit a row: unexpected end of template"),
        ("{{ prompt.__class__.__mro__ }}", "does not fit a row: access to attribute '__class__'"),
    ],
)
def test_a_template_over_columns_that_does_not_fit(tmp_path, text, message):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+2", "response": "3"}])
    assert message in refused(path, text=text)


def test_token_ids_are_taken_as_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"input_ids": [70, 71], "answer": "x"}])
    assert texts(path) == texts(path, ids="input_ids") == ["CD"]
    assert refused(write(path, [{"input_ids": "CD"}])) == "column 'input_ids' holds str, expected a list of token ids."


@pytest.mark.parametrize(
    ("row", "spec", "message"),
    [
        ({"q": 3, "a": "x"}, {"prompt": "q", "response": "a"}, "column 'q' holds int, expected text. Choose another"),
        ({"q": "x"}, {"prompt": "q", "response": "aa"}, "no column 'aa'. Known: q. Choose one with --column."),
        ({"q": "x", "c": "3"}, {"prompt": "q", "tool_calls": "c"}, "column 'c': expected a list of calls, got int."),
        ({"messages": AGENT, "tools": "3"}, {}, "column 'tools': expected a list of tools, got int."),
        ({"messages": AGENT, "tols": []}, {"tools": "toolz"}, "no column 'toolz'. Did you mean 'tols'?"),
        ({"q": "x", "cal": "3"}, {"prompt": "q", "tool_calls": "call"}, "no column 'call'. Did you mean 'cal'?"),
    ],
)  # fmt: skip
def test_columns_that_do_not_hold_what_they_should(tmp_path, row, spec, message):
    assert refused(write(tmp_path / "a.jsonl", [row]), **spec).startswith(message)


def test_the_embedded_models_template_renders_a_chat(tmp_path):
    from moeprune.checkpoint.load import load_tokenizer
    from moeprune.demo import MODEL_DIR

    tokenizer = load_tokenizer(MODEL_DIR)
    path = write(tmp_path / "a.jsonl", [{"prompt": "hello", "response": "world"}])
    (document,) = read_documents(DataSpec(source=str(path)), tokenizer=tokenizer, seed=0)
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}], tokenize=True
    )["input_ids"]
    assert list(document) == list(expected)
