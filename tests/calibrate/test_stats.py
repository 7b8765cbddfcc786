"""The statistics file: what is read is what was written, and everything else is refused with the way out."""

import json
import re

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

from moeprune.calibrate.stats import EXPERT_SUMS, LAYER_SUMS, Stats, merge_stats
from moeprune.cli import app
from moeprune.errors import StatsError
from moeprune.score import SCORES
from tests.fake_stats import fake_stats

INCOMPLETE = r"^{}: not a complete statistics file \(.+\)\. Calibrate again\.$"


def test_what_is_loaded_is_what_was_saved(tmp_path):
    stats = fake_stats()
    path = tmp_path / "new folder" / "stats.safetensors"
    stats.save(path)
    loaded = Stats.load(path)
    assert loaded.model == stats.model
    assert loaded.domains == stats.domains
    assert loaded.runs == stats.runs
    np.testing.assert_array_equal(loaded.tokens, stats.tokens)
    assert loaded.experts.keys() == EXPERT_SUMS.keys() and loaded.layers.keys() == LAYER_SUMS.keys()
    for name in EXPERT_SUMS:
        np.testing.assert_array_equal(loaded.experts[name], stats.experts[name], err_msg=name)
        assert loaded.experts[name].dtype == np.float64
    for name in LAYER_SUMS:
        np.testing.assert_array_equal(loaded.layers[name], stats.layers[name], err_msg=name)
    assert [file.name for file in path.parent.iterdir()] == ["stats.safetensors"]


def test_saving_twice_gives_the_same_bytes(tmp_path):
    fake_stats().save(tmp_path / "a")
    fake_stats().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_views_are_saved_as_what_they_show(tmp_path):
    stats = fake_stats()
    stats.experts["count"] = np.asfortranarray(stats.experts["count"])
    stats.save(tmp_path / "stats")
    np.testing.assert_array_equal(Stats.load(tmp_path / "stats").experts["count"], stats.experts["count"])


def test_a_missing_file(tmp_path):
    path = tmp_path / "none.safetensors"
    with pytest.raises(StatsError) as error:
        Stats.load(path)
    assert str(error.value) == (
        f"{path}: no such statistics file. `moeprune calibrate MODEL --data ... --out {path}` makes it."
    )


def test_a_folder_is_not_a_statistics_file(tmp_path):
    with pytest.raises(StatsError, match=f"^{re.escape(str(tmp_path))}: no such statistics file"):
        Stats.load(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_a_truncated_file(tmp_path, length):
    path = tmp_path / "stats"
    fake_stats().save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(StatsError, match=INCOMPLETE.format(re.escape(str(path)))):
        Stats.load(path)


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"format": 1}')
    with pytest.raises(StatsError, match=INCOMPLETE.format(re.escape(str(path)))):
        Stats.load(path)


def test_weights_are_not_statistics(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(StatsError) as error:
        Stats.load(path)
    assert str(error.value) == f"{path}: a safetensors file, but not statistics of moeprune."


def rewritten(path, header_change):
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["moeprune"]) | header_change
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(arrays, path, {"moeprune": json.dumps(header)})


def test_a_later_format(tmp_path):
    path = tmp_path / "stats"
    fake_stats().save(path)
    rewritten(path, {"format": 3})
    with pytest.raises(StatsError) as error:
        Stats.load(path)
    assert str(error.value) == f"{path}: statistics format 3; this version of moeprune reads 2. Update moeprune."


def test_a_later_format_is_refused_even_when_its_arrays_are_unknown(tmp_path):
    path = tmp_path / "stats"
    save_file({"renamed": np.zeros(3)}, path, {"moeprune": '{"format": 7}'})
    with pytest.raises(StatsError, match="statistics format 7; this version of moeprune reads 2"):
        Stats.load(path)


@pytest.mark.parametrize("name", EXPERT_SUMS)
def test_a_value_that_is_not_finite_is_named(tmp_path, name):
    stats = fake_stats()
    stats.experts[name][1, 0, 7] = np.inf
    path = tmp_path / "stats"
    stats.save(path)
    with pytest.raises(StatsError) as error:
        Stats.load(path)
    assert str(error.value) == (
        f"{path}: {name} of model.layers.1 expert 7 in domain 'math' is inf. "
        "The model overflows on this text; calibrate in another dtype."
    )


def test_an_entropy_that_is_not_finite_is_named():
    stats = fake_stats()
    stats.layers["gate_entropy_sum"][0, 1] = np.nan
    with pytest.raises(StatsError) as error:
        stats.check("calibration")
    assert str(error.value) == (
        "calibration: gate_entropy_sum of model.layers.2 in domain 'code' is nan. "
        "The model overflows on this text; calibrate in another dtype."
    )


@pytest.fixture
def partial():
    """Statistics of a model that gives contributions alone."""
    stats = fake_stats()
    for name in ("norm_sum", "norm_sq_sum", "max_abs"):
        del stats.experts[name]
    return stats


def test_sums_that_a_model_does_not_give_are_not_in_the_file(partial, tmp_path):
    path = tmp_path / "stats"
    partial.save(path)
    with safe_open(path, framework="numpy") as file:
        assert not {f"experts.{name}" for name in ("norm_sum", "norm_sq_sum", "max_abs")} & set(file.keys())
    loaded = Stats.load(path)
    assert loaded.experts.keys() == EXPERT_SUMS.keys() - {"norm_sum", "norm_sq_sum", "max_abs"}
    assert loaded.absent == ("norm_sum", "norm_sq_sum", "max_abs")
    assert loaded.mixed().keys() == loaded.experts.keys()
    assert fake_stats().absent == ()


def test_statistics_of_format_1_are_read(tmp_path):
    """They had six expert sums and the entropy, and neither halves nor a level."""
    stats, path = fake_stats(), tmp_path / "stats"
    old = ("count", "gate_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum", "max_abs")
    arrays = {f"experts.{name}": stats.experts[name] for name in old} | {"tokens": stats.tokens}
    arrays["layers.gate_entropy_sum"] = stats.layers["gate_entropy_sum"]
    header = {"format": 1, "model": stats.model.model_dump(mode="json"), "domains": list(stats.domains), "runs": []}
    save_file(arrays, path, {"moeprune": json.dumps(header)})
    loaded = Stats.load(path)
    assert loaded.format == 1 and loaded.statistics == "standard" and loaded.halves == {} and loaded.more == {}
    assert loaded.experts.keys() == set(old)
    np.testing.assert_array_equal(SCORES.get("reap").saliency(loaded), SCORES.get("reap").saliency(stats))
    with pytest.raises(
        StatsError, match=r"token_gated_norm_sum, which statistics of format 1 do not have\. Calibrate a"
    ):
        SCORES.get("easy-ep").saliency(loaded)
    assert merge_stats([loaded, stats]).experts.keys() == set(old)
    shown = CliRunner().invoke(app, ["stats", "show", str(path)], catch_exceptions=False).stdout
    assert "do not tell even from odd rows" in shown


def test_a_quantity_of_a_higher_level_is_asked_for():
    with pytest.raises(StatsError) as error:
        fake_stats().need("count", "coactivation")
    assert str(error.value) == (
        "coactivation is needed (tokens routed to both experts), which only `moeprune calibrate --stats merge` gives."
    )


def test_merging_levels_gives_the_lowest():
    low, high = Stats.zeros(fake_stats().model, domains=["a"]), Stats.zeros(
        fake_stats().model, domains=["a"], statistics="merge"
    )  # fmt: skip
    low.tokens[:] = high.tokens[:] = 3
    assert "coactivation" in high.more and merge_stats([high, high]).more["coactivation"].shape == (1, 2, 10, 10)
    merged = merge_stats([low, high])
    assert merged.statistics == "standard" and "coactivation" not in merged.more


def test_a_part_that_saw_no_token_takes_nothing_from_the_others():
    empty, whole = fake_stats(tokens=0), fake_stats()
    del empty.experts["max_abs"]
    whole.more["output_sum"] = np.ones((2, 10, 5))
    whole.statistics = "merge"
    merged = merge_stats([empty, whole])
    np.testing.assert_array_equal(merged.experts["max_abs"], whole.experts["max_abs"])
    np.testing.assert_array_equal(merged.more["output_sum"], whole.more["output_sum"])


def test_what_is_kept_for_all_domains_together_is_added_and_not_mixed():
    parts = [fake_stats(seed=seed) for seed in (1, 2)]
    for part in parts:
        part.statistics = "merge"
        part.more["output_sum"] = np.random.default_rng(0).normal(size=(2, 10, 5))
        part.more["coactivation"] = np.random.default_rng(1).uniform(size=(2, 2, 10, 10))
    merged = merge_stats(parts)
    np.testing.assert_allclose(merged.more["output_sum"], 2 * parts[0].more["output_sum"])
    mixed = merged.mixed({"code": 1.0}, names=["output_sum", "coactivation"])
    np.testing.assert_array_equal(mixed["output_sum"], merged.more["output_sum"])
    scale = merged.tokens.sum() / merged.tokens[0]
    np.testing.assert_allclose(mixed["coactivation"], merged.more["coactivation"][0] * scale)


def test_an_unknown_array_is_refused(tmp_path):
    stats, path = fake_stats(), tmp_path / "stats"
    stats.halves["novel"] = np.zeros((2, 2))
    stats.save(path)
    with pytest.raises(StatsError, match=r"halves\.novel is no quantity that moeprune knows"):
        Stats.load(path)


def test_a_sum_that_one_part_lacks_is_unknown_for_the_whole(partial):
    whole = fake_stats(seed=1)
    for parts in ([partial, whole], [whole, partial]):
        merged = merge_stats(parts)
        assert merged.absent == ("norm_sum", "norm_sq_sum", "max_abs")
        np.testing.assert_array_equal(merged.experts["count"], partial.experts["count"] + whole.experts["count"])


def test_a_file_without_counts_is_refused(tmp_path):
    stats = fake_stats()
    del stats.experts["count"]
    stats.save(tmp_path / "stats")
    with pytest.raises(StatsError) as error:
        Stats.load(tmp_path / "stats")
    assert str(error.value) == f"{tmp_path / 'stats'}: statistics without 'experts.count'. Calibrate again."


def test_showing_statistics_names_what_is_absent(partial, tmp_path):
    for name, stats, said in (("partial", partial, True), ("whole", fake_stats(), False)):
        stats.save(tmp_path / name)
        shown = CliRunner().invoke(app, ["stats", "show", str(tmp_path / name)], catch_exceptions=False).stdout
        assert ("without norm_sum, norm_sq_sum, max_abs, which calibration does not give for" in shown) == said
        as_json = CliRunner().invoke(app, ["stats", "show", str(tmp_path / name), "--json"], catch_exceptions=False)
        assert json.loads(as_json.stdout)["absent"] == list(stats.absent)
