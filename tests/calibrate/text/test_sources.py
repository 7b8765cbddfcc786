"""Reading data: shuffled by the seed alone, as little of it as is needed, from local files and from the Hub."""

import json
from itertools import islice

import pytest
from datasets import IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moeprune.calibrate.data import check_domains, read_domain
from moeprune.calibrate.text.documents import read_documents
from moeprune.calibrate.text.sources import SMALLEST_BUFFER, shuffled_rows
from moeprune.data_spec import DataSpec, expand_demo
from moeprune.errors import DataError
from tests.calibrate.tokenizer import NUM_IDS, byte_tokenizer


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{at}", "kind": ["even", "odd"][at % 2]}) + "\n" for at in range(500)))
    return path


def order(path, seed: int, **spec) -> list[str]:
    return [row["text"] for row in shuffled_rows(DataSpec(source=str(path), **spec), seed=seed)]


def test_a_file_of_lines_is_shuffled_as_a_whole(path):
    first = order(path, 0)
    assert sorted(first, key=int) == [str(at) for at in range(500)]
    assert first == order(path, 0) != order(path, 1)
    begin = [int(text) for text in first[:50]]
    assert min(begin) < 100 and max(begin) > 400, "not only what stands first"


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_every_rank_reads_the_same(path, variable, monkeypatch):
    alone = order(path, 0)
    monkeypatch.setenv(variable, "3")
    assert order(path, 0) == alone


def test_lines_are_read_as_they_are_asked_for(path):
    """A line that nobody asks for may be broken."""
    with path.open("a") as file:
        file.write("{broken\n" * 500)
    rows = shuffled_rows(DataSpec(source=str(path)), seed=0)
    with pytest.raises(DataError, match="cannot be read as JSON"):
        list(rows)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:500]))
    assert len(list(islice(shuffled_rows(DataSpec(source=str(path)), seed=0), 3))) == 3


def test_the_last_line_needs_no_newline_and_blank_lines_are_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "0"}\n\n{"text": "1"}')
    assert sorted(order(tmp_path / "a.jsonl", 0)) == ["0", "1"]


def test_rows_are_chosen_by_their_values(path):
    assert {int(text) % 2 for text in order(path, 0, where={"kind": "odd"})} == {1}
    assert len(order(path, 0, where={"kind": ["odd", "even"]})) == 500
    with pytest.raises(DataError, match=r"no column 'kin' \(where\)\. Did you mean 'kind'\?"):
        order(path, 0, where={"kin": "odd"})


def test_as_many_documents_as_asked_for(path):
    tokenizer = byte_tokenizer()
    assert len(list(read_documents(DataSpec(source=str(path), documents=7), tokenizer=tokenizer, seed=0))) == 7
    long = read_documents(DataSpec(source=str(path), min_tokens=3), tokenizer=tokenizer, seed=0)
    assert len(list(long)) == 400, "those of three digits"


def test_a_budget_that_no_document_is_long_enough_for(path):
    with pytest.raises(DataError) as error:
        read_domain(
            DataSpec(source=str(path), min_tokens=9, where={"kind": "odd"}), tokenizer=byte_tokenizer(), length=8,
            tokens=50, seed=0, vocab_size=NUM_IDS,
        )  # fmt: skip
    assert "(where {'kind': ('odd',)}, of 9 tokens or more)." in str(error.value)


class Hub:
    """A stand-in for `datasets.load_dataset`: it records what is asked for, and how many rows are read."""

    def __init__(self, rows: int):
        self.asked: list[tuple] = []
        self.read = 0
        self._rows = rows

    def __call__(self, name, subset=None, *, split, streaming, data_files=None):
        self.asked.append((name, subset, split, data_files))
        assert streaming

        def generate():
            for at in range(self._rows):
                self.read += 1
                yield {"text": f"document {at}"}

        return IterableDataset.from_generator(generate)


def test_a_data_set_of_the_hub_is_read_no_further_than_needed(monkeypatch):
    hub = Hub(100_000)
    monkeypatch.setattr("datasets.load_dataset", hub)
    spec = DataSpec(source="org/set", subset="en", split="validation", files="en/*.gz", documents=25)
    rows = read_domain(spec, tokenizer=byte_tokenizer(), length=64, tokens=0, seed=0, vocab_size=NUM_IDS)
    assert hub.asked == [("org/set", "en", "validation", "en/*.gz")]
    assert 25 <= hub.read <= SMALLEST_BUFFER + 26
    texts = bytes(token - 3 for token in rows.ids[rows.mask].tolist() if token > 2).decode().split("document ")[1:]
    assert len(texts) == 25 and texts != sorted(texts, key=int), "shuffled"


def test_a_budget_of_tokens_reads_no_further_either(monkeypatch):
    hub = Hub(100_000)
    monkeypatch.setattr("datasets.load_dataset", hub)
    rows = read_domain(
        DataSpec(source="org/set"), tokenizer=byte_tokenizer(), length=64, tokens=500, seed=0, vocab_size=NUM_IDS
    )
    assert rows.num_tokens == 500
    assert hub.read < 11_000


def test_a_misspelt_mix_is_told_from_a_data_set(monkeypatch):
    with pytest.raises(DataError, match=r"^raep: no such mix\. Did you mean 'reap'\? Known: choice-tasks, "):
        check_domains([DataSpec(source="raep")])
    check_domains([DataSpec(source="gsm8k"), DataSpec(source="reap-org/reaped")])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"neither a local file nor a data set .* Mixes that ship with moeprune: "):
        order("gsm8k", 0)


@pytest.mark.parametrize(("count", "tokens"), [(1, 3), (2, 6)])
def test_one_row_is_enough(tmp_path, count, tokens):
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n' * count)
    rows = read_domain(
        DataSpec(source=str(tmp_path / "a.jsonl")), tokenizer=byte_tokenizer(), length=8, tokens=99, seed=0,
        vocab_size=NUM_IDS,
    )  # fmt: skip
    assert rows.num_tokens == tokens


def test_a_tokenizer_that_does_not_know_the_text():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    (spec,) = expand_demo([DataSpec(source="demo/english")])
    with pytest.raises(
        DataError, match=r"761 of 778 tokens are unknown to the tokenizer or padding\. It is not one for"
    ):
        read_domain(spec, tokenizer=tokenizer, length=64, tokens=500, seed=0, vocab_size=2)


def test_text_of_nothing_but_padding_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "<pad><pad><pad>"}\n')
    with pytest.raises(DataError, match="3 of 3 tokens are unknown to the tokenizer or padding"):
        read_domain(
            DataSpec(source=str(tmp_path / "a.jsonl")), tokenizer=byte_tokenizer(), length=8, tokens=99, seed=0,
            vocab_size=NUM_IDS,
        )  # fmt: skip
