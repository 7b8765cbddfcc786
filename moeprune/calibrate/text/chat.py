"""Chats as data sets hold them: messages, tools and calls, in one form."""

from __future__ import annotations

import json
import re
from typing import Any

Message = dict[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which a message holds what was thought before it was written; templates differ in which they read."""
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""The roles of chats that are stored as ``{"from": ..., "value": ...}``, as ShareGPT's are."""


def as_messages(value: Any) -> list[Message] | None:
    """A column's value as chat messages, also where it holds them as JSON text; None where it holds something else.

    Raises:
        ValueError: If a message has parts that are not text, or calls that cannot be read.
    """
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(message, dict) for message in value):
        return None
    if all(message.get("from") in ROLES and "value" in message for message in value):
        value = [{"role": ROLES[message["from"]], "content": message["value"]} for message in value]
    if not all(isinstance(message.get("role"), str) for message in value):
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
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = as_calls(calls)
    content = message.get("content", "")
    if isinstance(content, list):
        content = "\n".join(_text_of(part) for part in content)
    return message | {"content": content}


def _text_of(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise ValueError("a message has parts that are not text; choose text without images and the like")
    return text


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
