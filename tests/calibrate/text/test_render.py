"""Nothing of a chat is lost on its way through the templates of real models, and nothing stands there twice."""

import json

import pytest

from moeprune.calibrate.prompts import read_prompts
from moeprune.calibrate.text.documents import read_documents
from moeprune.data_spec import DataSpec
from moeprune.errors import DataError
from tests.calibrate.text.templates import ALL
from tests.calibrate.tokenizer import EOS, FIRST_BYTE, byte_tokenizer

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "zwei"}'}}
TALK = [
    {"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3."},
    {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."},
]  # fmt: skip
AGENT = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
TAGGED = "<think>\nhm, one\nand two\n</think>\n\nIt is 3."


def tokenizer(name: str):
    """It begins plain text with its first token, as most do; templates write that token by themselves."""
    from tokenizers.processors import TemplateProcessing

    made = byte_tokenizer(chat_template=ALL[name])
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    assert made("x")["input_ids"][0] == 0
    return made


def read(document: list[int]) -> str:
    named = {0: b"<bos>", EOS: b"<eos>"}
    return b"".join(named.get(token) or bytes([token - FIRST_BYTE]) for token in document).decode()


def rendered(tmp_path, name, messages, *, tools=None, **spec) -> str:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages, "tools": tools}))
    (document,) = read_documents(DataSpec(source=str(tmp_path / "a.jsonl"), **spec), tokenizer=tokenizer(name), seed=0)
    return read(document)


@pytest.mark.parametrize("name", ALL)
def test_a_chat_is_what_the_template_makes_of_it(tmp_path, name):
    expected = tokenizer(name).apply_chat_template(TALK, tokenize=True)["input_ids"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}))
    (document,) = read_documents(DataSpec(source=str(tmp_path / "a.jsonl")), tokenizer=tokenizer(name), seed=0)
    assert list(document) == expected
    assert document.count(0) == int("bos_token" in ALL[name])


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("qwen3", '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "zwei"}}\n</tool_call>'),
        ("gpt-oss", '<|start|>assistant to=functions.add<|message|>{"a": 1, "b": "zwei"}<|call|>'),
        ("glm-4.5", "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>"),
        ("llama", '<|header|>assistant<|/header|>{"name": "add", "parameters": {"a": 1, "b": "zwei"}}<|eot|>'),
    ],
)
def test_tools_and_calls_are_written_in_the_models_own_way(tmp_path, name, call):
    text = rendered(tmp_path, name, AGENT, tools=[TOOL])
    assert call in text and "It is 3." in text
    assert "add" in text[: text.index("1+2?")]


def test_calls_that_a_template_reads_as_text(tmp_path):
    assert rendered(tmp_path, "deepseek-v3.1", AGENT) == (
        '<bos><|User|>1+2?<|Assistant|></think><|call|>add<|sep|>{"a": 1, "b": "zwei"}<|end|><eos>'
        "<|output|>3It is 3.<eos>"
    )


@pytest.mark.parametrize(
    ("name", "messages", "tools"),
    [
        (
            "deepseek-r1",
            AGENT,
            None,
        ),  # its template writes calls where the content is None; transformers leaves None out
        ("deepseek-v3.1", AGENT, [TOOL]),
        ("gpt-oss", [AGENT[0], AGENT[1] | {"tool_calls": [CALL, CALL]}, *AGENT[2:]], [TOOL]),  # the second is lost
    ],
)
def test_what_a_template_would_lose_of_tools_is_refused(tmp_path, name, messages, tools):
    with pytest.raises(DataError, match="use tools, and the model's chat template has no place for them"):
        rendered(tmp_path, name, messages, tools=tools)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", None])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", f"<|im_start|>assistant\n{TAGGED}<|im_end|>\n"),
        ("deepseek-r1", f"<bos><|User|>1+2?<|Assistant|>{TAGGED}<eos>"),
        ("deepseek-v3.1", "<bos><|User|>1+2?<|Assistant|><think>hm, one\nand two</think>It is 3.<eos>"),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>hm, one\nand two<|end|>"
            "<|start|>assistant<|channel|>final<|message|>It is 3.<|return|>",
        ),
        ("glm-4.5", "\n<think>hm, one\nand two</think>\nIt is 3."),
    ],
)
def test_the_last_thought_is_written_whatever_field_held_it(tmp_path, name, expected, field):
    answer = {"content": TAGGED} if field is None else {"content": "It is 3.", field: "hm, one\nand two"}
    text = rendered(tmp_path, name, [TALK[0], {"role": "assistant", **answer}])
    assert text.endswith(expected)
    assert text.count("hm, one") == 1


def test_a_thought_that_may_go_is_left_to_the_template(tmp_path):
    messages = [TALK[0], {"role": "assistant", "content": TAGGED}]
    assert rendered(tmp_path, "deepseek-r1", messages, drop=("reasoning",)).endswith("<|Assistant|>\n\nIt is 3.<eos>")


def test_a_lone_answer_whose_thought_would_be_lost_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no place for it\. Leave it out with drop=reasoning"):
        rendered(tmp_path, "deepseek-r1", [{"role": "assistant", "content": TAGGED}])


def test_roles_that_do_not_take_turns_are_refused_with_the_templates_words(tmp_path):
    with pytest.raises(DataError, match=r"refuses a chat \(roles user, user\): Conversation roles must alternate"):
        rendered(tmp_path, "mixtral", [TALK[0], TALK[0]])


@pytest.mark.parametrize("name", ALL)
def test_a_prompt_ends_where_the_answer_begins(tmp_path, name):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}))
    (prompt,) = read_prompts([DataSpec(source=str(tmp_path / "a.jsonl"))], tokenizer=tokenizer(name))
    expected = tokenizer(name).apply_chat_template(TALK[:-1], add_generation_prompt=True, tokenize=True)["input_ids"]
    assert list(prompt.ids) == expected


def test_chats_of_sharegpt(tmp_path):
    said = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": said}))
    (document,) = read_documents(DataSpec(source=str(tmp_path / "a.jsonl")), tokenizer=tokenizer("llama"), seed=0)
    assert read(document) == (
        "<bos><|header|>system<|/header|>s<|eot|><|header|>user<|/header|>a<|eot|><|header|>assistant<|/header|>b<|eot|>"
    )


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"content": [{"type": "image"}, {"type": "text", "text": "a"}]}, "a message has parts that are not text"),
        ({"content": "", "tool_calls": "[1]"}, "expected a list of calls, got list"),
        ({"content": "", "tool_calls": {"name": "add"}}, "expected a list of calls, got dict"),
    ],
)
def test_messages_that_cannot_be_read(tmp_path, message, why):
    with pytest.raises(DataError, match=f"column 'messages': {why}"):
        rendered(tmp_path, "llama", [{"role": "user", **message}])


def test_calls_as_json_text_in_a_message(tmp_path):
    messages = [AGENT[0], AGENT[1] | {"tool_calls": json.dumps([CALL["function"]])}]
    assert '"name": "add", "arguments": {"a": 1' in rendered(tmp_path, "qwen3", messages)
