"""A recipe small enough to be run many times."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeprune.recipe import Recipe
from tests.models import save_with_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("tiny") / "tiny-moe")


@pytest.fixture
def recipe(tiny_model: Path) -> Recipe:
    return make_recipe(tiny_model)


def make_recipe(model: Path, **changes: object) -> Recipe:
    values = {
        "model": str(model),
        "calibrate": {"data": ["demo/python", "demo/german"], "tokens": 300, "length": 64},
        "variants": [
            {"top_k": 2},
            {"score": ["reap", "random"], "keep": 0.5},
            {"score": "ean", "keep": 0.8, "top_k": 2},
        ],
        "export": "ean-80-topk-2",
        "evaluate": {"tasks": ["offline_choice_python", "offline_bpb_german"], "limit": 2},
        "throughput": {"batch": 1, "prompt_tokens": 4, "new_tokens": 2, "repeats": 1},
    }
    return Recipe.model_validate(values | changes)
