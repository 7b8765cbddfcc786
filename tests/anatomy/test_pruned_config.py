"""The config of a pruned checkpoint where the Hub spells it in its own way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.pruned_config import prune_config_json
from moeprune.anatomy.skeleton import load_config
from moeprune.anatomy.tiny import NUM_EXPERTS, tiny_config
from moeprune.errors import UnsupportedModelError


def raw_config(model_type: str) -> dict[str, Any]:
    """The config.json of a tiny model as transformers writes it."""
    return json.loads(tiny_config(CONFIG_MAPPING[model_type]).to_json_string())


def anatomy_of(raw: dict[str, Any], folder: Path) -> Anatomy:
    (folder / "config.json").write_text(json.dumps(raw))
    return derive_anatomy(load_config(folder))


@pytest.mark.parametrize(
    ("model_type", "key"), [("unlimited_ocr", "language_config"), ("nemotron_h_omni", "llm_config")]
)
def test_the_language_model_under_its_former_key(tmp_path, model_type, key):
    """transformers reads these keys and writes text_config; the counts once had nowhere to go."""
    raw = raw_config(model_type)
    raw = {key if name == "text_config" else name: value for name, value in raw.items()}
    pruned = prune_config_json(raw, anatomy_of(raw, tmp_path), num_experts=9, top_k=2)
    assert list(pruned) == list(raw)
    assert pruned[key]["n_routed_experts"] == 9
    again = anatomy_of(pruned, tmp_path)
    assert (again.num_experts.value, again.top_k.value) == (9, 2)


def test_a_language_model_that_the_config_leaves_to_defaults(tmp_path):
    anatomy = anatomy_of(raw_config("llama4"), tmp_path)
    pruned = prune_config_json({"model_type": "llama4"}, anatomy, num_experts=9, top_k=1)
    assert pruned["text_config"]["num_local_experts"] == 9


def test_lists_lose_the_entries_of_dropped_prediction_layers(tmp_path):
    """Step-3.5's lists go on for its prediction layers; transformers refuses them when there are none."""
    raw = raw_config("step3p7")
    text = raw["text_config"] | {"num_nextn_predict_layers": 2, "swiglu_limits": [0.0, 7.0, 7.0, 7.0, 0.5, 0.5]}
    text["layer_types"] = [*text["layer_types"], "sliding_attention", "sliding_attention"]
    raw["text_config"] = text
    anatomy = anatomy_of(raw, tmp_path)
    kept = prune_config_json(raw, anatomy, num_experts=9, top_k=2)["text_config"]
    assert (kept["layer_types"], kept["num_nextn_predict_layers"]) == (text["layer_types"], 2)
    dropped = prune_config_json(raw, anatomy, num_experts=9, top_k=2, mtp="drop")["text_config"]
    assert dropped["layer_types"] == text["layer_types"][:4]
    assert dropped["swiglu_limits"] == [0.0, 7.0, 7.0, 7.0]
    assert dropped["num_nextn_predict_layers"] == 0
    assert anatomy_of(raw | {"text_config": dropped}, tmp_path).num_experts.value == 9


def test_counts_that_transformers_would_not_read_are_refused(tmp_path):
    """Written where nobody looks, the pruned checkpoint would be built with the experts of the original."""
    raw = raw_config("qwen3_moe")
    anatomy = anatomy_of(raw, tmp_path)
    elsewhere = replace(anatomy, num_experts=replace(anatomy.num_experts, path=("backbone",)))
    with pytest.raises(UnsupportedModelError, match="would read num_local_experts = 12 from the config of the pruned"):
        prune_config_json(raw, elsewhere, num_experts=9, top_k=2)


def test_numbers_that_json_does_not_have_survive(tmp_path):
    """Nemotron-H's config has an Infinity."""
    raw = raw_config("nemotron_h") | {"time_step_limit": [0.0, float("inf")]}
    pruned = prune_config_json(raw, anatomy_of(raw, tmp_path), num_experts=NUM_EXPERTS - 1, top_k=2)
    assert pruned["time_step_limit"] == [0.0, float("inf")]
