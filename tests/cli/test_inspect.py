"""``moeprune inspect`` on paper: what it prints of well-known models and of folders with weights."""

from __future__ import annotations

import json
from pathlib import Path

from tests.anatomy.published import config_of
from tests.cli.test_commands import moeprune
from tests.gguf.files import EXPERTS, FAMILIES, write_model
from tests.models import save
from tests.pruning import edit_config


def printed(folder: Path, name: str) -> dict[str, str]:
    """The rows at the top of what is printed of a published config, by their titles."""
    (folder / "config.json").write_text(json.dumps(config_of(name)))
    return rows(moeprune("inspect", folder))


def rows(text: str) -> dict[str, str]:
    """The rows before the first empty line."""
    lines = text.split("\n\n")[0].splitlines()[1:]
    return {line[:14].strip(): line[15:] for line in lines}


def test_deepseek_v3_on_paper(tmp_path):
    found = printed(tmp_path, "DeepSeek-V3")
    assert found == {
        "layers": "61, 58 of them with experts (dense: 0-2)",
        "experts": "256 a layer + 1 shared, top-8",
        "router": "sigmoid, renormalised, correction bias, 4 of 8 groups, weights x 2.5",
        "context": "163,840 tokens",
        "parameters": "671 B, 37.6 B active a token (927 M of them the input embedding)",
        "stored": "627 GiB, 42.0 MiB an expert  (from the config; no weights here)",
        "quantised": "FP8 block 128x128",
        "prediction": "1 multi-token prediction layer, not among the parameters",
    }


def test_dense_layers_between_the_others(tmp_path):
    assert printed(tmp_path, "Jamba-v0.1")["layers"] == "32, 16 of them with experts (dense: 0, 2, 4, ..., 30)"


def test_what_is_not_there_has_no_row(tmp_path):
    found = printed(tmp_path, "Mixtral-8x7B-v0.1")
    assert found["layers"] == "32, 32 of them with experts"
    assert not {"quantised", "prediction"} & found.keys()


def test_prediction_layers_in_the_config_that_are_not_stored(tmp_path):
    folder = save("glm4_moe", tmp_path)
    edit_config(folder, num_nextn_predict_layers=2)
    assert rows(moeprune("inspect", folder))["prediction"] == (
        "2 multi-token prediction layers in the config, none stored"
    )
    assert rows(moeprune("inspect", folder))["stored"].endswith("(F32)")


def test_a_gguf_file(tmp_path):
    file = write_model(tmp_path / "model.gguf", next(iter(FAMILIES.values())))
    facts = json.loads(moeprune("inspect", file, "--json"))
    assert facts["format"] == "gguf"
    assert facts["num_experts"] == EXPERTS
    assert moeprune("inspect", file).startswith(f"{file}: {facts['architecture']} (GGUF)")
