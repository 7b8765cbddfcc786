"""Chats as the model's own template renders them, with tools and reasoning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moeprune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which a message holds what was thought before it was written; templates differ in which they read."""


def as_messages(value: Any) -> list[Message] | None:
    """A column's value as chat messages, also where it holds them as JSON text; None where it holds something else."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(message, dict) and "role" in message for message in value):
        return None
    return [_message(message) for message in value]


def as_tools(value: Any) -> list[dict[str, Any]] | None:
    """A column's value as the tools of a chat, each as ``{"type": "function", "function": {...}}``; None for none.

    Raises:
        ValueError: If it holds something else.
    """
    value = _without_nulls(json.loads(value) if isinstance(value, str) and value.strip() else value)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"expected a list of tools, got {type(value).__name__}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]


def as_calls(value: Any) -> list[dict[str, Any]]:
    """A column's value, ``[{"name": ..., "arguments": ...}]``, as the tool calls of a message.

    Raises:
        ValueError: If it holds something else.
    """
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise ValueError(f"expected a list of calls, got {type(value).__name__}")
    return [_call(call if "function" in call else {"type": "function", "function": call}) for call in value]


def _message(message: Message) -> Message:
    message = _without_nulls(message)
    if message.get("tool_calls"):
        message["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    content = message.get("content", "")
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "\n".join(part["text"] for part in content)
    return message | {"content": content}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments are an object: templates write it as their model was trained to, JSON text they would quote."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return call | {"function": function | {"arguments": arguments}}


def _without_nulls(value: Any) -> Any:
    """Tables fill fields that a row lacks with null, where templates ask whether a field is there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


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
    if tools is not None and "tools" in drop:
        tools = None
    if "tools" not in drop and "tool" not in template and (tools or any("tool_calls" in m for m in messages)):
        raise DataError(
            f"{source}: the chats use tools, and the model's chat template has no place for them. Leave them out with "
            "drop=tools, or choose text without tools."
        )
    if "tools" in drop:
        messages = [{key: item for key, item in message.items() if key != "tool_calls"} for message in messages]
    messages = _with_reasoning(messages, template, source=source, drop="reasoning" in drop)
    from jinja2.exceptions import TemplateError

    render: Any = tokenizer.apply_chat_template
    try:
        return render(list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        roles = ", ".join(str(message["role"]) for message in messages[:6])
        raise DataError(
            f"{source}: the model's chat template refuses a chat (roles {roles}): {error}. Choose other text, or a "
            "column of plain text."
        ) from error


def _template(tokenizer: PreTrainedTokenizerBase, tools: Any, source: str) -> str:
    try:
        return tokenizer.get_chat_template(None, tools)
    except ValueError as error:
        raise DataError(
            f"{source}: these are chats, but the tokenizer has no chat template. Choose a column of plain text "
            "(column=...), write it from several (text='{{ a }} {{ b }}'), or calibrate the model's instruct variant."
        ) from error


def _with_reasoning(messages: Sequence[Message], template: str, *, source: str, drop: bool) -> list[Message]:
    """Messages with their reasoning under the name that the template reads."""
    read = next((name for name in REASONING if name in template), None)
    fitted = []
    for message in messages:
        held = next((name for name in REASONING if message.get(name)), None)
        rest = {key: item for key, item in message.items() if key not in REASONING}
        if held is None or drop:
            fitted.append(rest)
        elif read is None:
            raise DataError(
                f"{source}: messages hold {held!r}, and the model's chat template has no place for it. Leave it out "
                "with drop=reasoning, or write it into the content."
            )
        else:
            fitted.append(rest | {held if held in template else read: message[held]})
    return fitted
