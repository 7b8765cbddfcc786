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


DOCUMENTS = [{"text": f"document {at}", "number": at} for at in range(30)]


def written(folder, name: str, rows=DOCUMENTS):
    """The rows as a file of the kind that its name says."""
    import bz2
    import gzip
    import lzma

    import pyarrow
    import pyarrow.parquet

    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".parquet" in name:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines)
    if ".csv" in name or ".tsv" in name:
        between = "\t" if ".tsv" in name else ","
        text = "\n".join(between.join(map(str, values)) for values in [rows[0], *(row.values() for row in rows)])
    elif ".json" in name and ".jsonl" not in name:
        text = f"[{','.join(lines)}]"
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "wb") as file:
        file.write(text.encode())
    return path


def texts(source, **spec) -> list[str]:
    return sorted(row["text"] for row in shuffled_rows(DataSpec(source=str(source), **spec), seed=0))


EXPECTED = sorted(row["text"] for row in DOCUMENTS)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.json.bz2", "a.csv.xz", "A.JSONL"]
)
def test_a_file_of_any_kind(tmp_path, name):
    spec = DataSpec(source=str(written(tmp_path, name)))
    assert texts(spec.source) == EXPECTED
    assert spec.name.lower() == "a"
    check_domains([spec])


@pytest.mark.parametrize("name", ["{}.jsonl", "{}.jsonl.gz", "{}.parquet"])
def test_files_that_a_pattern_names(tmp_path, name):
    for at in range(3):
        written(tmp_path / "set", name.format(f"part-{at}"), DOCUMENTS[10 * at : 10 * at + 10])
    assert texts(tmp_path / "set" / name.format("*")) == EXPECTED
    assert texts(tmp_path / "set" / name.format("part-[01]")) == sorted(row["text"] for row in DOCUMENTS[:20])
    assert DataSpec(source=str(tmp_path / "set" / name.format("*"))).name == "set"
    assert DataSpec(source=str(tmp_path / "set" / name.format("part-*"))).name == "part"


def test_lines_of_several_files_are_shuffled_together(tmp_path):
    for at in range(3):
        written(tmp_path, f"{at}.jsonl", DOCUMENTS[10 * at : 10 * at + 10])
    numbers = [row["number"] for row in shuffled_rows(DataSpec(source=str(tmp_path / "*.jsonl")), seed=0)]
    assert len({number // 10 for number in numbers[:6]}) > 1


def test_a_folder_is_read_like_a_data_set_of_the_hub(tmp_path):
    written(tmp_path, "data/train-00000.parquet", DOCUMENTS[:20])
    written(tmp_path, "data/test-00000.parquet", DOCUMENTS[20:])
    assert texts(tmp_path) == sorted(row["text"] for row in DOCUMENTS[:20])
    assert texts(tmp_path, split="test") == sorted(row["text"] for row in DOCUMENTS[20:])
    with pytest.raises(DataError, match=r"cannot be read as a data set .* Bad split: tset"):
        texts(tmp_path, split="tset")


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_folder_that_datasets_saved(tmp_path, dictionary):
    """The demonstrations in EASY-EP's repository are such folders."""
    from datasets import Dataset, DatasetDict

    whole = Dataset.from_list(DOCUMENTS)
    (DatasetDict({"train": whole}) if dictionary else whole).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved") == EXPECTED


def test_a_file_of_text_is_one_document_also_in_a_folder(tmp_path):
    for at in range(2):
        (tmp_path / f"{at}.txt").write_text(f"{at}\nsecond line\n\nthird")
    expected = ["0\nsecond line\n\nthird", "1\nsecond line\n\nthird"]
    assert texts(tmp_path) == texts(tmp_path / "*.txt") == expected


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}\n{"text": "b"}'.encode("utf-8-sig"))
    assert texts(tmp_path / "a.jsonl") == ["b", "é"]


def test_messages_of_different_fields_in_a_json_list(tmp_path):
    """`datasets` (5.2) gives their content as JSON text, quoted."""
    rows = [{"messages": [{"role": "user", "content": at, "more": {"x": at}}]} for at in ("a", "b")]
    rows.append({"messages": [{"role": "user", "content": [{"type": "text", "text": "c"}], "more": {"x": 1}}]})
    (tmp_path / "a.json").write_text(json.dumps(rows))
    tokenizer = byte_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    found = read_documents(DataSpec(source=str(tmp_path / "a.json")), tokenizer=tokenizer, seed=0)
    assert sorted(bytes(token - 3 for token in document).decode() for document in found) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("a.jsonl", {"split": "test"}, "'split' is for data sets of the Hub and folders; a file has none."),
        ("a.jsonl", {"subset": "en"}, "'subset' is for data sets of the Hub and folders; a file has none."),
        ("*.parquet", {}, "no file has such a name."),
        ("*", {}, "expected a file ending in .jsonl, .json, .csv, .tsv, .parquet, .txt, .md, or in one of these and "
         ".gz, .bz2, .xz; a pattern must name files of one kind."),
    ],
)  # fmt: skip
def test_files_that_cannot_be_meant(tmp_path, name, spec, message):
    written(tmp_path, "a.jsonl")
    written(tmp_path, "a.csv")
    with pytest.raises(DataError) as error:
        check_domains([DataSpec(source=str(tmp_path / name), **spec)])
    assert str(error.value) == f"{tmp_path / name}: {message}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "one"}', ["one"]), ('{\n "text":\n "one"\n}', ["one"]), ('["one", "two"]', ["one", "two"]),
        ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"]), ('\ufeff[{"text": "one"}]', ["one"]),
    ],
)  # fmt: skip
def test_what_a_json_file_may_hold(tmp_path, content, expected):
    (tmp_path / "a.json").write_text(content)
    assert texts(tmp_path / "a.json") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "an empty file"), ("[1, 2]", "expected a list of objects"), ('[{"text": "one"', "cannot be read as JSON"),
        ('{"text": "one"}\n{"te', "cannot be read as JSON"),
    ],
)  # fmt: skip
def test_what_a_json_file_may_not_hold(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "a.json")


def test_a_compressed_file_of_nothing(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: an empty file\."):
        texts(written(tmp_path, "a.jsonl.gz", []))


def test_an_end_that_the_tokenizer_writes_is_not_written_twice(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    rows = read_domain(
        DataSpec(source=str(written(tmp_path, "a.jsonl", DOCUMENTS[:2]))), tokenizer=tokenizer, length=64, tokens=100,
        seed=0, vocab_size=NUM_IDS, packing="pad",
    )  # fmt: skip
    assert (rows.ids == 1).sum(dim=1).tolist() == [1, 1]
