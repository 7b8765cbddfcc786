"""Prompts for a model to answer, in order, from the same sources as calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeprune.calibrate.data import check_source
from moeprune.calibrate.text.chat import Message, as_tools
from moeprune.calibrate.text.documents import messages_of, written
from moeprune.calibrate.text.render import render_chat
from moeprune.calibrate.text.sources import Row, shuffled_rows
from moeprune.data_mix import expand_data
from moeprune.data_spec import DataSpec
from moeprune.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 1 << 60
COLUMNS = ("messages", "conversations", "prompt", "question", "instruction", "text")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        domain: The domain that its answer will belong to.
        text: As the model reads it, up to where its answer begins.
        ids: The same as token ids.
    """

    domain: str
    text: str
    ids: tuple[int, ...]


def read_prompts(specs: Sequence[DataSpec], *, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> list[Prompt]:
    """Every prompt of the sources, or as many of each as its ``documents``.

    A chat is cut after its last message that is not the assistant's. A text in a column of questions becomes a chat of
    one message where the tokenizer has a chat template; a column ``text`` is continued as it stands. A row with a
    ``domain`` belongs to it.

    Args:
        specs: The sources, mixes among them; ``column``, ``prompt`` or ``text`` says what to read of a row.
        tokenizer: The model's.
        seed: Order.

    Raises:
        DataError: If a source cannot be read, has no column to read or nothing in it.
    """
    prompts: list[Prompt] = []
    for spec in expand_data(specs, tokens=UNLIMITED):
        if spec.documents is None and spec.tokens != UNLIMITED:
            raise DataError(
                f"{spec.source}: prompts are counted, their answers' tokens are not known. Give documents=N."
            )
        check_source(spec)
        found = 0
        for row in shuffled_rows(spec, seed=seed):
            prompt = _prompt(row, spec, tokenizer)
            if prompt is not None:
                prompts.append(prompt)
                found += 1
            if found == spec.documents:
                break
        if not found:
            raise DataError(f"{spec.source}: no prompts; every row is empty.")
    return prompts


def _prompt(row: Row, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Prompt | None:
    domain = row["domain"] if isinstance(row.get("domain"), str) else spec.name
    if spec.text is not None:
        return _continued(written(row, spec), domain, tokenizer)
    column = spec.column or spec.prompt or next((name for name in COLUMNS if name in row), None)
    if column is None or column not in row:
        wanted = repr(column) if column else f"any of {', '.join(COLUMNS)}"
        raise DataError(f"{spec.source}: no column {wanted}. {did_you_mean(column or '', row)}")
    messages = messages_of(row[column], spec, column)
    if messages is not None:
        return _chat(_question(messages), row, spec, domain, tokenizer)
    text = row[column]
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str):
        raise DataError(f"{spec.source}: column {column!r} holds {type(text).__name__}, expected text or messages.")
    if column != "text" and tokenizer.chat_template is not None:
        return _chat([{"role": "user", "content": text}], row, spec, domain, tokenizer)
    return _continued(text, domain, tokenizer)


def _continued(text: str, domain: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    encode: Any = tokenizer
    return Prompt(domain, text, tuple(encode(text, truncation=False)["input_ids"]))


def _question(messages: list[Message]) -> list[Message]:
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def _chat(
    messages: list[Message], row: Row, spec: DataSpec, domain: str, tokenizer: PreTrainedTokenizerBase
) -> Prompt | None:
    if not messages:
        return None
    try:
        tools = as_tools(row.get(spec.tools or "tools"))
    except ValueError as error:
        raise DataError(f"{spec.source}: column {spec.tools or 'tools'!r}: {error}.") from error
    text = render_chat(messages, tokenizer=tokenizer, source=spec.source, tools=tools, drop=spec.drop, prompt=True)
    encode: Any = tokenizer
    return Prompt(domain, text, tuple(encode(text, add_special_tokens=False, truncation=False)["input_ids"]))
