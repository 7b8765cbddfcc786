"""Text to packed rows: the right column, tokens in order, exactly the budget, and padding that is marked as such."""

import json
from pathlib import Path

import pytest

from moeprune.calibrate.data import Rows, read_domain
from moeprune.data_spec import DataSpec
from moeprune.errors import DataError
from tests.calibrate.tokenizer import CHAT_TEMPLATE, EOS, NUM_IDS, PAD, byte_tokenizer, ids_of

TOKENIZER = byte_tokenizer()
TEXTS = ["alpha", "bêta", "", "  \n", "gamma\ndelta"]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def read(
    path, *, packing="concat", length=8, tokens=1000, seed=0, tokenizer=TOKENIZER, vocab_size=NUM_IDS, **spec
) -> Rows:
    return read_domain(
        DataSpec(source=str(path), **spec), tokenizer=tokenizer, length=length, tokens=tokens, seed=seed,
        vocab_size=vocab_size, packing=packing,
    )  # fmt: skip


def documents(rows: Rows) -> list[list[int]]:
    """The token ids between the end-of-text tokens."""
    found: list[list[int]] = [[]]
    for token in rows.ids[rows.mask].tolist():
        if token == EOS:
            found.append([])
        else:
            found[-1].append(token)
    assert found.pop() == [], "every document ends with the end-of-text token"
    return found


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_table_format_gives_its_documents_without_the_blank_ones(tmp_path, suffix):
    path = write(tmp_path / f"code{suffix}", [{"text": text} for text in TEXTS])
    rows = read(path)
    assert rows.domain == "code"
    assert sorted(documents(rows)) == sorted(map(ids_of, ["alpha", "bêta", "gamma\ndelta"]))


@pytest.mark.parametrize("name", ["book.txt", "book.md", "BOOK.TXT"])
def test_a_text_file_is_one_document(tmp_path, name):
    (tmp_path / name).write_text("one\n\ntwo\nthree", encoding="utf-8")
    assert documents(read(tmp_path / name)) == [ids_of("one\n\ntwo\nthree")]


def test_the_first_known_column_is_the_default(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": "x", "prompt": "p", "content": "c"}])
    assert documents(read(path)) == [ids_of("c")]


def test_a_chosen_column_goes_before_the_default(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "t", "question": "q"}])
    assert documents(read(path, column="question")) == [ids_of("q")]


CHAT = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}]


def test_messages_are_rendered_with_the_chat_template(tmp_path):
    rows = read(write(tmp_path / "chat.jsonl", CHAT), tokenizer=byte_tokenizer(chat_template=CHAT_TEMPLATE))
    assert documents(rows) == [ids_of("[user]hi[assistant]yo")]


def test_messages_without_a_chat_template_are_refused(tmp_path):
    path = write(tmp_path / "chat.jsonl", CHAT)
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == (
        f"{path}: these are chats, but the tokenizer has no chat template. Choose a column of plain text "
        "(column=...), write it from several (text='{{ a }} {{ b }}'), or calibrate the model's instruct variant."
    )


def test_tokens_stay_in_order_across_rows(tmp_path):
    text = "".join(chr(ord("!") + at % 90) for at in range(150))
    rows = read(write(tmp_path / "a.jsonl", [{"text": text}]), length=7)
    assert rows.ids[rows.mask].tolist() == [*ids_of(text), EOS]
    assert rows.ids.shape == rows.mask.shape == (22, 7)


def test_only_the_end_of_the_last_row_is_padding(tmp_path):
    rows = read(write(tmp_path / "a.jsonl", [{"text": "0123456789"}]), length=8)
    assert rows.ids.tolist() == [ids_of("01234567"), [*ids_of("89"), EOS, *[PAD] * 5]]
    assert rows.mask.tolist() == [[True] * 8, [True] * 3 + [False] * 5]
    assert rows.num_tokens == 11


def test_text_that_fills_its_rows_has_no_padding(tmp_path):
    rows = read(write(tmp_path / "a.jsonl", [{"text": "0123456"}]), length=8)
    assert rows.ids.shape == (1, 8) and rows.mask.all()


@pytest.mark.parametrize("tokens", [1, 8, 19, 24])
def test_the_budget_is_spent_exactly(tmp_path, tokens):
    path = write(tmp_path / "a.jsonl", [{"text": "abcde"}] * 20)
    rows = read(path, tokens=tokens)
    assert rows.num_tokens == tokens
    assert len(rows.ids) == -(-tokens // 8)


def test_the_budget_of_a_domain_goes_before_that_of_the_run(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "abcde"}] * 20)
    spec = DataSpec(source=str(path), tokens=13)
    rows = read_domain(spec, tokenizer=TOKENIZER, length=8, tokens=99, seed=0, vocab_size=NUM_IDS, packing="concat")
    assert rows.num_tokens == 13


def test_a_budget_beyond_the_text_takes_all_of_it(tmp_path):
    assert read(write(tmp_path / "a.jsonl", [{"text": "abcde"}]), tokens=10**9).num_tokens == 6


def test_the_seed_alone_decides_the_order(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"document {index}"} for index in range(30)])
    first, again, other = (documents(read(path, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other)


def test_a_tokenizer_without_end_and_padding_tokens(tmp_path):
    rows = read(
        write(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "ab"}]),
        tokenizer=byte_tokenizer(eos_token=None, pad_token=None), length=3,
    )  # fmt: skip
    assert rows.ids.tolist() == [ids_of("aba"), [*ids_of("b"), 0, 0]]
    assert rows.num_tokens == 4


TYPES = "expected text or messages ([{'role': ..., 'content': ...}]). Choose another with --column."
REFUSED = {
    "missing column": (
        '{"text": "a", "label": "b"}', {"column": "labels"},
        "no column 'labels'. Did you mean 'label'? Known: label, text. Choose one with --column.",
    ),
    "no known column": (
        '{"body": "a"}', {},
        "no column any of text, content, messages, conversations, input_ids, prompt. Known: body. Choose one with "
        "--column.",
    ),
    "a number": ('{"text": 3}', {}, f"column 'text' holds int, {TYPES}"),
    "nothing but null": ('{"text": null}', {}, "there are no rows, or no text in any of them."),
    "other messages": (
        '{"conversations": [{"who": "user", "value": "hi"}]}', {}, f"column 'conversations' holds list, {TYPES}"
    ),
    "only blank text": ('{"text": " "}', {}, "there are no rows, or no text in any of them."),
    "only blank text in a chosen column": (
        '{"text": "a", "b": ""}', {"column": "b"}, "there are no rows, or no text in 'b' in any of them.",
    ),
    "empty": ("", {}, "an empty file."),
    "blank": ("\n \n", {}, "an empty file."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_without_usable_text(tmp_path, case):
    content, spec, message = REFUSED[case]
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read(path, **spec)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"plain words", "cannot be read as JSON: Expecting value: line 1 column 1"),
        ("a.txt", b"caf\xe9", "cannot be read as text: 'utf-8' codec can't decode byte 0xe9 in position 3"),
        (
            "a.parquet", b"plain words",
            "cannot be read as parquet: Parquet magic bytes",
        ),
    ],
)  # fmt: skip
def test_a_damaged_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: {message}")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"text": ', "line 2: cannot be read as JSON: Expecting value: line 1 column 9 (char 8)."),
        (b'{"text": "caf\xe9"}', "line 2: cannot be read as JSON: 'utf-8' codec can't decode byte 0xe9 in position 13"),
        (b'"text"', 'line 2: expected an object such as {"text": "..."}, got b\'"text"\\n\'.'),
        (b"[" * 100_000, "line 2: cannot be read as JSON: maximum recursion depth exceeded"),
    ],
)
def test_a_damaged_line_of_a_file_is_named(tmp_path, second, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + second + b"\n")
    with pytest.raises(DataError) as error:
        read(tmp_path / "a.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}, {message}")


def test_ids_beyond_the_embeddings_are_refused_before_the_model_sees_them(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "z"}])
    with pytest.raises(DataError) as error:
        read(path, vocab_size=97)
    assert str(error.value) == (
        f"{path}: the tokenizer gives id {ord('z') + 3}, the model has 97 embeddings. "
        "Tokenizer and model do not belong together."
    )


def test_a_tokenizer_that_warns_of_long_text_stays_silent(tmp_path, caplog):
    """Documents are longer than the context by nature; they are cut into rows."""
    path = write(tmp_path / "a.jsonl", [{"text": "long " * 50}])
    assert read(path, tokenizer=byte_tokenizer(model_max_length=16)).num_tokens == 251
    assert not caplog.records


def test_a_data_set_that_does_not_exist(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as error:
        read("no-such-org/no-such-set", subset="main", split="test")
    assert str(error.value).startswith(
        "no-such-org/no-such-set: neither a local file nor a data set that could be opened (subset 'main', split "
        "'test'): "
    )
