"""Configs of well-known models as they are on the Hub: their sizes as published, their spellings read right."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.inspect import inspect_model
from moeprune.anatomy.pruned_config import prune_config_json
from moeprune.anatomy.skeleton import load_config
from tests.anatomy.published import FOLDER, MODELS, Figure, config_of

FIGURES = [(name, figure) for name, published in MODELS.items() for figure in published.figures]
COARSE = [(name, figure) for name, figure in FIGURES if figure.digits != "exact"]


def title(value: str | Figure) -> str:
    """How a test names its case."""
    return f"{value.of}-{value.billions}" if isinstance(value, Figure) else value


def write_config(folder: Path, name: str) -> Path:
    """A folder with the config of a published model."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((FOLDER / f"{name}.json").read_text())
    return folder


class Inspected:
    """What ``moeprune inspect`` says of each model, and how long it took; each is derived once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seconds: dict[str, float] = {}

    @cache  # noqa: B019, lives as long as the tests of this file
    def __call__(self, name: str) -> dict[str, Any]:
        folder = write_config(self.folder / name, name)
        started = time.process_time()
        found = inspect_model(folder)
        self.seconds[name] = time.process_time() - started
        return found


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Inspected:
    return Inspected(tmp_path_factory.mktemp("published"))


def counted(figure: Figure, parameters: dict[str, Any]) -> int:
    """The number that a publisher would give for what ``inspect`` found."""
    return parameters[figure.of] - sum(parameters["by_part"][part] for part in figure.without)


@pytest.mark.parametrize(("name", "figure"), FIGURES, ids=title)
def test_parameter_counts_are_those_the_makers_publish(inspected, name, figure):
    number = counted(figure, inspected(name)["parameters"])
    assert figure.agrees(number), f"counted {number / 1e9:.3f}, published {figure.billions} ({figure.source})"


@pytest.mark.parametrize(("name", "figure"), COARSE, ids=title)
def test_digits_are_only_rounded_or_cut_where_one_percent_is_too_fine(inspected, name, figure):
    number = counted(figure, inspected(name)["parameters"])
    assert not figure.agrees(number, digits="exact")
    if figure.digits == "cut":
        assert not figure.agrees(number, digits="rounded")


def test_a_figure_is_compared_digit_by_digit():
    assert Figure("total", "46.7", "").agrees(46_703_000_000)
    assert not Figure("total", "46.7", "").agrees(47_200_000_000)
    assert Figure("active", "37", "", digits="rounded").agrees(36_626_000_000)
    assert not Figure("active", "37", "", digits="rounded").agrees(37_552_000_000)
    assert Figure("active", "2.4", "", digits="cut").agrees(2_451_000_000)
    assert not Figure("active", "2.4", "", digits="cut").agrees(2_399_000_000)
    assert Figure("total", "1e3", "", digits="rounded").agrees(1_026_000_000_000)
    assert not Figure("total", "1e3", "", digits="rounded").agrees(1_600_000_000_000)


def test_every_config_has_figures_and_every_figure_a_config():
    assert {path.stem for path in FOLDER.glob("*.json")} == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_thousand_billion_parameters_are_described_in_seconds(inspected, name):
    json.dumps(inspected(name))
    assert inspected.seconds[name] < 5, "seconds of processor time, once transformers is imported"


# How the configs are spelled


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The object of a config.json that describes the language model."""
    return config.get("text_config", config)


@pytest.mark.parametrize("name", [name for name in MODELS if "rope_theta" in text_part(config_of(name))])
def test_rope_is_read_from_its_old_spelling(tmp_path, name):
    raw = text_part(config_of(name))
    scaling = raw.get("rope_scaling") or {}
    config: Any = load_config(write_config(tmp_path, name))
    rope = config.get_text_config(decoder=True).rope_parameters
    assert rope["rope_theta"] == raw["rope_theta"]
    assert rope["rope_type"] == scaling.get("rope_type", scaling.get("type", "default"))
    assert {key: rope[key] for key in scaling if key != "type"} == {k: v for k, v in scaling.items() if k != "type"}


@pytest.mark.parametrize("name", MODELS)
def test_the_dtype_is_read_under_either_name(tmp_path, name):
    raw = config_of(name)
    config: Any = load_config(write_config(tmp_path, name))
    expected = raw.get("dtype", raw.get("torch_dtype"))
    assert config.dtype is None if expected is None else str(config.dtype) == f"torch.{expected}"


# The names under which each of these files spells the two counts.
EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
TOP_K = {"num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k", "moe_top_k"}


def differences(before: Any, after: Any, path: str = "") -> dict[str, Any]:
    """Values of ``after`` that differ from ``before``, by key path; both have the same keys in the same order."""
    if isinstance(before, dict) and isinstance(after, dict):
        assert list(before) == list(after) or set(after) - set(before) <= EXPERTS | TOP_K
        found: dict[str, Any] = {}
        for key in before:
            found |= differences(before[key], after[key], f"{path}.{key}")
        return found
    return {} if before == after else {path: after}


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_config_differs_in_its_counts_alone(tmp_path, name):
    raw = config_of(name)
    anatomy = derive_anatomy(load_config(write_config(tmp_path, name)))
    kept = anatomy.num_experts.value // 2
    pruned = prune_config_json(raw, anatomy, num_experts=kept, top_k=anatomy.top_k.value)
    changed = differences(raw, pruned)
    assert {path.rpartition(".")[2] for path in changed} <= EXPERTS
    assert set(changed.values()) == {kept}
    (tmp_path / "config.json").write_text(json.dumps(pruned))
    assert derive_anatomy(load_config(tmp_path)).num_experts.value == kept
