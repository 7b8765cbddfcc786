"""Documents: a row of data as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moeprune.calibrate.text.chat import Message, as_calls, as_messages, as_tools
from moeprune.calibrate.text.render import render_chat
from moeprune.calibrate.text.sources import Row, shuffled_rows
from moeprune.data_spec import DataSpec
from moeprune.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_COLUMNS = ("text", "content", "messages", "conversations", "input_ids")
PAIRS = (
    ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"),
    ("question", "answer"),
)  # fmt: skip
"""Questions with their answers, where there is none of :data:`TEXT_COLUMNS`."""
EXPECTED = "expected text or messages ([{'role': ..., 'content': ...}])"


class Document(list[int]):
    """Token ids of one document.

    Attributes:
        whole: Whether it says by itself where it ends, as a chat does.
    """

    whole: bool = False


def read_documents(spec: DataSpec, *, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[Document]:
    """The documents of a domain, as many as its ``documents``; blank ones are passed over.

    Args:
        spec: The domain.
        tokenizer: The model's tokenizer.
        seed: Their order.

    Raises:
        DataError: If a column or the chat template is missing, or a row does not hold what its column promises.
    """
    given = 0
    spec = spec.model_copy()
    for row in shuffled_rows(spec, seed=seed):
        if _unsaid(spec):
            spec = spec.model_copy(update=_known_columns(row, spec))
        document = _document(row, spec, tokenizer)
        if document and len(document) >= spec.min_tokens:
            yield document
            given += 1
            if given == spec.documents:
                return


def _unsaid(spec: DataSpec) -> bool:
    return spec.ids is None and spec.text is None and spec.prompt is None and spec.column is None


def _known_columns(row: Row, spec: DataSpec) -> dict[str, str]:
    """What to read of the rows, from the names of their columns."""
    for name in TEXT_COLUMNS:
        if name in row:
            return {"ids" if name == "input_ids" else "column": name}
    for prompt, response in PAIRS:
        if prompt in row and response in row:
            return {"prompt": prompt, "response": response}
    if "prompt" in row:
        return {"column": "prompt"}
    wanted = ", ".join([*TEXT_COLUMNS, "prompt"])
    raise DataError(f"{spec.source}: no column any of {wanted}. {did_you_mean('', row)} Choose one with --column.")


def _value(row: Row, spec: DataSpec, column: str) -> Any:
    if column not in row:
        raise DataError(f"{spec.source}: no column {column!r}. {did_you_mean(column, row)} Choose one with --column.")
    return row[column]


def _document(row: Row, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Document:
    if spec.ids is not None:
        return _given_ids(_value(row, spec, spec.ids), spec)
    if spec.text is not None:
        return _plain(written(row, spec), tokenizer)
    if spec.prompt is not None:
        return _chat(_answered(row, spec), row, spec, tokenizer)
    assert spec.column is not None
    value = _value(row, spec, spec.column)
    messages = messages_of(value, spec, spec.column)
    if messages is not None:
        return _chat(messages, row, spec, tokenizer)
    if value is None or isinstance(value, str):
        return _plain(value or "", tokenizer)
    raise DataError(
        f"{spec.source}: column {spec.column!r} holds {type(value).__name__}, {EXPECTED}. Choose another with --column."
    )


def messages_of(value: Any, spec: DataSpec, column: str) -> list[Message] | None:
    """A column's value as chat messages; None where it holds something else.

    Raises:
        DataError: If it holds messages that are not all text.
    """
    try:
        return as_messages(value)
    except ValueError as error:
        raise DataError(f"{spec.source}: column {column!r}: {error}.") from error


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    encode: Any = tokenizer  # its annotations allow far more than what is given here
    return Document(encode(text, truncation=False)["input_ids"] if text.strip() else [])


def _chat(messages: list[Message], row: Row, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Document:
    """A chat that its template has written; the template also writes the tokens with which it begins and ends."""
    name = spec.tools or "tools"
    held = _value(row, spec, name) if spec.tools else row.get(name)
    try:
        tools = as_tools(held)
    except ValueError as error:
        raise DataError(f"{spec.source}: column {name!r}: {error}.") from error
    text = render_chat(messages, tokenizer=tokenizer, source=spec.source, tools=tools, drop=spec.drop)
    encode: Any = tokenizer
    document = Document(encode(text, add_special_tokens=False, truncation=False)["input_ids"])
    document.whole = True
    return document


def _answered(row: Row, spec: DataSpec) -> list[Message]:
    assert spec.prompt is not None
    messages: list[Message] = [{"role": "user", "content": _words(row, spec, spec.prompt)}]
    if spec.response is None and spec.tool_calls is None:
        return messages
    answer: Message = {"role": "assistant", "content": _words(row, spec, spec.response) if spec.response else ""}
    if spec.tool_calls is not None:
        held = _value(row, spec, spec.tool_calls)
        try:
            answer["tool_calls"] = as_calls(held)
        except ValueError as error:
            raise DataError(f"{spec.source}: column {spec.tool_calls!r}: {error}.") from error
    return [*messages, answer]


def _words(row: Row, spec: DataSpec, column: str) -> str:
    value = _value(row, spec, column)
    if isinstance(value, str):
        return value
    raise DataError(
        f"{spec.source}: column {column!r} holds {type(value).__name__}, expected text. Choose another column."
    )


def _given_ids(value: Any, spec: DataSpec) -> Document:
    if not isinstance(value, list) or not all(isinstance(token, int) and token >= 0 for token in value):
        raise DataError(
            f"{spec.source}: column {spec.ids!r} holds {type(value).__name__}, expected a list of token ids."
        )
    document = Document(value)
    document.whole = True
    return document


def written(row: Mapping[str, Any], spec: DataSpec) -> str:
    """A row as the domain's template over its columns writes it.

    Raises:
        DataError: If the template is broken or asks for a column that is not there.
    """
    from jinja2 import StrictUndefined
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    assert spec.text is not None
    try:
        return SandboxedEnvironment(undefined=StrictUndefined).from_string(spec.text).render(row)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"{spec.source}: the template {spec.text!r} does not fit a row: {error}. Columns: {', '.join(row)}."
        ) from error
