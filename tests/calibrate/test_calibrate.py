"""From a checkpoint folder and text files to statistics; impossible work is refused before the model is loaded."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from moeprune import __version__
from moeprune.anatomy.source import open_source
from moeprune.calibrate.calibrate import calibrate, read_calibration
from moeprune.calibrate.data import check_domains
from moeprune.data_spec import DataSpec
from moeprune.errors import DataError
from tests.calibrate.tokenizer import byte_tokenizer
from tests.models import save


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(save("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe")))


@pytest.fixture
def specs(tmp_path):
    """Capitals only: the tiny model has ids below 97."""
    for name in ("code", "math"):
        (tmp_path / f"{name}.txt").write_text(name.upper() * 30)
    return [DataSpec(source=str(tmp_path / f"{name}.txt")) for name in ("code", "math")]


def read(source, data, **options):
    options = {"tokens": 60, "length": 16, "seed": 0} | options
    return read_calibration(source, tokenizer=byte_tokenizer(), data=data, **options)


def test_a_checkpoint_and_two_files_give_statistics_of_two_domains(source, specs):
    rows = read(source, specs)
    model = AutoModelForCausalLM.from_pretrained(source.path)
    stats = calibrate(source, model=model, rows=rows, batch_size=3, seed=5, quiet=True)
    assert stats.model == source.facts
    assert stats.domains == ("code", "math")
    assert stats.tokens.tolist() == [60, 60]
    np.testing.assert_array_equal(stats.experts["count"].sum(-1), np.full((2, 2), 60 * 3))
    (run,) = stats.runs
    assert run.pop("seconds") >= 0
    texts = run.pop("text")
    assert texts.keys() == {"code", "math"} and texts["code"] != texts["math"]
    assert run == {
        "moeprune": __version__, "dtype": "float32", "device": "cpu", "seed": 5, "length": 16,
        "tokens": {"code": 60, "math": 60},
    }  # fmt: skip


def test_rows_longer_than_the_context_are_refused(source, specs):
    with pytest.raises(DataError) as error:
        read(source, specs, length=129)
    assert str(error.value) == "rows of 129 tokens are longer than the model's context of 128. Give --length 128."
    assert read(source, specs, length=128)[0].ids.shape == (1, 128)


def test_another_models_tokenizer_is_refused(source, tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("lower case letters have ids from 100 on")
    with pytest.raises(DataError, match=r"the tokenizer gives id \d+, the model has 97 embeddings"):
        read(source, [DataSpec(source=str(path))])


def refused(specs) -> str:
    with pytest.raises(DataError) as error:
        check_domains(specs)
    return str(error.value)


def test_no_data_at_all():
    assert refused([]) == (
        "no calibration data. Give at least one --data DOMAIN=FILE (jsonl, json, parquet, txt) or Hub id."
    )


def test_two_domains_of_one_name(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.txt").write_text("x")
    specs = [DataSpec(source=str(tmp_path / folder / "train.txt")) for folder in ("a", "b")]
    assert refused(specs) == "two data sets are named 'train'. Give them names: --data NAME=SOURCE."
    check_domains([specs[0], specs[1].model_copy(update={"domain": "other"})])


def test_a_file_of_an_unknown_kind(tmp_path):
    path = tmp_path / "data.docx"
    path.write_text("text")
    assert refused([DataSpec(source=str(path))]) == (
        f"{path}: expected a file ending in .jsonl, .json, .csv, .tsv, .parquet, .txt, .md, or in one of these and "
        ".gz, .bz2, .xz."
    )


@pytest.mark.parametrize("source", ["none.jsonl", "./none", "/none/at/all", "~/none.txt", "folder/none.PARQUET"])
def test_a_file_that_does_not_exist(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        refused([DataSpec(source=source)]) == f"{Path(source).expanduser() if '~' in source else source}: no such file."
    )


def test_a_hub_id_is_not_taken_for_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_domains([DataSpec(source="org/data.set-v1")])
