"""A chat as the text that a model reads: its own template, given every part under the name and in the form it reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from moeprune.calibrate.text.chat import REASONING, Message
from moeprune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
# Templates that write a thought only where they are told that the model thinks read one of these.
THINKS = {"thinking": True, "enable_thinking": True}
REFUSALS = (TemplateError, TypeError, ValueError, KeyError)
"""What a template raises that was not made for a chat."""
Render = Callable[..., str]


def render_chat(
    messages: Sequence[Message],
    *,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    tools: list[dict[str, Any]] | None = None,
    drop: Sequence[str] = (),
    prompt: bool = False,
) -> str:
    """The text of a chat as the model reads it.

    Templates differ in what they read: arguments of calls as an object or as JSON text, reasoning as a field or between
    tags in the content. A form is looked for in which nothing is missing. The thought of the last answer is written
    after the generation prompt, as the model writes it, where the template would cut it off, as DeepSeek's do. Thoughts
    of earlier answers are left to the template.

    Args:
        messages: The messages.
        tokenizer: The model's, with its template.
        source: Where they come from, for messages.
        tools: What the chat may call.
        drop: ``tools`` and ``reasoning`` that the template has no place for and that may go.
        prompt: End where the model's answer begins.

    Raises:
        DataError: If there is no template, or it refuses the chat or would leave out a part of it.
    """
    template = _template(tokenizer, tools, source)
    if "tools" in drop:
        tools, messages = None, [_without(message, "tool_calls") for message in messages]
    if "reasoning" in drop:
        messages = [_without(message, *REASONING) for message in messages]
    messages = _with_reasoning(messages, template, source=source)
    write: Any = tokenizer.apply_chat_template

    def render(chat: Sequence[Message], tools: Any = tools, prompt: bool = prompt, **options: Any) -> str:
        return write(list(chat), tools=tools, tokenize=False, add_generation_prompt=prompt, **options)

    text, messages = _complete(messages, tools, render, source=source)
    if prompt or "reasoning" in drop:
        return text
    return _with_last_thought(text, messages, render, end=str(tokenizer.eos_token or ""), source=source)


def _template(tokenizer: PreTrainedTokenizerBase, tools: Any, source: str) -> str:
    try:
        return tokenizer.get_chat_template(None, tools)
    except ValueError as error:
        raise DataError(
            f"{source}: these are chats, but the tokenizer has no chat template. Choose a column of plain text "
            "(column=...), write it from several (text='{{ a }} {{ b }}'), or calibrate the model's instruct variant."
        ) from error


def _without(message: Message, *names: str) -> Message:
    return {key: item for key, item in message.items() if key not in names}


def _complete(
    messages: Sequence[Message], tools: list[dict[str, Any]] | None, render: Render, *, source: str
) -> tuple[str, Sequence[Message]]:
    """The text with all tools and calls in it, and the messages in the form that gives it."""
    refused: Exception | None = None
    lost = False
    for chat in _forms(messages):
        try:
            text = render(chat)
            if not _leaves_out(chat, tools, render):
                return text, chat
            lost = True
        except REFUSALS as error:
            refused = refused or error
    if lost:
        raise DataError(
            f"{source}: the chats use tools, and the model's chat template has no place for them. Leave them out with "
            "drop=tools, or choose text without tools."
        )
    roles = ", ".join(str(message["role"]) for message in messages[:6])
    raise DataError(
        f"{source}: the model's chat template refuses a chat (roles {roles}): {refused}. Choose other text, or a "
        "column of plain text."
    ) from refused


def _forms(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """A chat with calls in the ways in which templates read them; the common one first."""
    yield messages
    if any(message.get("tool_calls") for message in messages):
        yield [_with_arguments_as_text(message) for message in messages]


def _with_arguments_as_text(message: Message) -> Message:
    def written(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
            return call
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    if "tool_calls" not in message:
        return message
    return message | {"tool_calls": [written(call) for call in message["tool_calls"]]}


def _leaves_out(messages: Sequence[Message], tools: list[dict[str, Any]] | None, render: Render) -> bool:
    """Whether a tool or a call is not in the text: each is given a name that cannot be there otherwise."""
    marks: list[str] = []

    def marked(item: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(item.get("function"), dict):
            return item
        marks.append(f"moeprune{len(marks)}mark")
        return item | {"function": item["function"] | {"name": marks[-1]}}

    chat = [
        message | {"tool_calls": [marked(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]
    offered = None if tools is None else [marked(tool) for tool in tools]
    if not marks:
        return False
    text = render(chat, tools=offered)
    return any(mark not in text for mark in marks)


def _with_reasoning(messages: Sequence[Message], template: str, *, source: str) -> list[Message]:
    """Messages with their reasoning where the template reads it: in fields, or in the content between tags."""
    # `enable_thinking` and `reasoning_effort` are settings of the template, not fields of a message.
    fields = [name for name in REASONING if re.search(rf"[.'\"]{name}\b", template)]
    tags = "</think>" in template
    fitted = []
    for message in messages:
        held = next((name for name in REASONING if message.get(name)), None)
        thought, content = message.get(held) if held else None, message["content"]
        if held is None and fields and not tags and message["role"] == "assistant" and isinstance(content, str):
            thought, content = _split(content)
        rest = _without(message, *REASONING) | {"content": content}
        if not thought:
            fitted.append(rest)
        elif fields:
            fitted.append(rest | dict.fromkeys(fields, thought))
        elif tags:
            fitted.append(rest | {"content": f"<think>\n{thought}\n</think>\n\n{content}"})
        else:
            raise _no_place(source, held)
    return fitted


def _no_place(source: str, held: str | None) -> DataError:
    what = f"hold {held!r}" if held else "hold reasoning"
    return DataError(
        f"{source}: messages {what}, and the model's chat template has no place for it. Leave it out with "
        "drop=reasoning, or write it into the content."
    )


def _split(content: str) -> tuple[str, str]:
    """What was thought and what was said, of a content that may begin with a thought between tags."""
    found = THOUGHT.fullmatch(content)
    return (found[1].strip("\n"), found[2].lstrip("\n")) if found else ("", content)


def _with_last_thought(text: str, messages: Sequence[Message], render: Render, *, end: str, source: str) -> str:
    """The text with the thought of the last answer in it."""
    last = messages[-1]
    if last["role"] != "assistant" or not isinstance(last["content"], str | None):
        return text
    held = next((name for name in REASONING if last.get(name)), None)
    thought, said = (str(last[held]), last["content"]) if held else _split(last["content"] or "")
    if thought.strip() in text:
        return text
    if last.get("tool_calls") or len(messages) == 1:
        raise _no_place(source, held)
    try:
        begin = render(messages[:-1], prompt=True, **THINKS)
    except REFUSALS as error:
        raise _no_place(source, held) from error
    if begin.endswith("<think>"):
        return f"{begin}{thought.strip()}</think>{said}{end}"
    opening = "" if begin.rstrip().endswith("<think>") else "<think>\n"
    return f"{begin}{opening}{thought.strip()}\n</think>\n\n{said}{end}"
