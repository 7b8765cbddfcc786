"""`moeprune check` and `moeprune plan --for`, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeprune.anatomy.source import open_source
from moeprune.cli import app
from moeprune.errors import DeployError, PlanError
from moeprune.plan.plan import Plan
from tests.fake_hub import FakeHub, hub
from tests.fake_stats import facts, fake_stats
from tests.models import save
from tests.pruning import edit_config, random_plan

__all__ = ["hub"]  # a fixture


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


def rules_of(report: dict) -> dict[str, list[str]]:
    return {finding["rule"]: finding["engines"] for finding in report["findings"]}


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("deepseek_v3", tmp_path_factory.mktemp("check") / "deepseek")


def test_a_checkpoint_that_an_engine_cannot_load_ends_with_status_1(deepseek):
    text = run("check", deepseek, "--engine", "vllm", status=1)
    assert text.startswith("deepseek_v3: 16 experts, top-3, 2 of 4 groups\nerror    topk-method (vllm)\n")
    assert 'Add "topk_method": "noaux_tc"' in text
    assert "rules hold." in text and "blackwell-fp8, tuned-file: --gpu" in text


def test_a_checkpoint_that_every_engine_loads_ends_with_status_0(tmp_path):
    source = save("mixtral", tmp_path / "mixtral")
    report = json.loads(run("check", source, "--json"))
    assert report["ok"] and report["note"] is None
    assert "top-k-fits" in report["passed"] and "tuned-file" in report["unchecked"]
    for engine in ("vllm", "sglang", "llama.cpp", "transformers"):
        run("check", source, "--engine", engine)


def test_groups_that_transformers_would_scramble_are_an_error_for_every_engine(deepseek, tmp_path):
    """config.json edited by hand to 18 experts in 4 groups; the router of such a model can still be looked at."""
    broken = save("deepseek_v3", tmp_path / "broken")
    edit_config(broken, n_routed_experts=18, topk_method="noaux_tc")
    report = json.loads(run("check", broken, "--json", status=1))
    found = [finding for finding in report["findings"] if finding["rule"] == "groups-divide"]
    assert sorted(engine for finding in found for engine in finding["engines"]) == [
        "llama.cpp", "sglang", "transformers", "vllm",
    ]  # fmt: skip
    assert all("Keep 16 or 20" in finding["instead"] for finding in found)


def test_a_config_that_transformers_refuses_is_still_checked(tmp_path):
    source = save("qwen3_moe", tmp_path / "source")
    edit_config(source, num_experts_per_tok=[3, 2, 2])
    report = json.loads(run("check", source, "--json", status=1))
    assert rules_of(report)["one-top-k"] == ["vllm", "sglang", "transformers"]
    assert report["note"].startswith("its router was not looked at: ")
    assert report["unchecked"]["fused-top-k"] == [
        "whether the router has a correction bias", "how the router scores",
    ]  # fmt: skip


def test_a_plan_alone_leaves_what_only_config_json_knows_unchecked(deepseek, tmp_path):
    path = tmp_path / "plan.json"
    random_plan(open_source(deepseek).facts, keep=12, top_k=3).save(path)
    report = json.loads(run("check", path, "--json"))
    assert report["unchecked"]["topk-method"] == ["config.json"]
    assert rules_of(report)["multiple-of-eight"] == ["vllm", "sglang"]
    with_config = json.loads(run("check", path, "--model", deepseek, "--json", status=1))
    assert rules_of(with_config)["topk-method"] == ["vllm", "sglang"]
    assert set(with_config["unchecked"]) == {"blackwell-fp8", "tuned-file"}


def test_a_plan_is_checked_as_it_will_be_exported(deepseek, tmp_path):
    path = tmp_path / "plan.json"
    plan = random_plan(open_source(deepseek).facts, keep=12, top_k=3)
    plan.model_copy(update={"n_group": 1}).save(path)
    for target in ((path, "--model", deepseek), (path,)):
        assert run("check", *target, "--engine", "transformers").startswith("deepseek_v3: 12 experts, top-3\n")


def test_a_model_beside_a_checkpoint_is_refused(deepseek):
    with pytest.raises(DeployError, match="--model belongs to a plan"):
        run("check", deepseek, "--model", deepseek)


def test_the_spread_over_devices_decides(tmp_path):
    source = save("mixtral", tmp_path / "mixtral")
    assert "6 experts on 4 expert-parallel ranks" in run(
        "check", source, "--engine", "sglang", "--tp", 4, "--ep", 4, status=1
    )
    run("check", source, "--engine", "sglang", "--tp", 2, "--ep", 2)


def test_plan_for_an_engine_chooses_a_number_and_says_why(tmp_path):
    stats, out = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    fake_stats(facts(num_experts=64, top_k=4)).save(stats)
    text = run("plan", stats, "--keep", 0.7, "--for", "vllm", "--ep", 8, "--tp", 8, "--out", out)
    assert f"{out}: 48 of 64 experts" in text
    assert "chosen for vllm: 48 experts instead of 45: 45 experts on 8 expert-parallel ranks" in text
    assert Plan.load(out).num_experts == 48
    assert "advice: (vllm) the router's top-k has no fused kernel for 48 experts" in text


def test_plan_for_an_engine_refuses_a_number_given_by_hand(tmp_path):
    stats, out = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    fake_stats(facts(num_experts=64, top_k=4)).save(stats)
    with pytest.raises(PlanError, match=r"Keep 40 or 48, or plan without --for\.$"):
        run("plan", stats, "--keep-experts", 45, "--for", "sglang", "--ep", 8, "--out", out)
    assert not out.exists()
    with pytest.raises(PlanError, match="belong to --for ENGINE"):
        run("plan", stats, "--keep", 0.5, "--ep", 8, "--out", out)


def test_plan_without_an_engine_takes_the_number_and_gives_advice(tmp_path):
    stats, out = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    fake_stats(facts(num_experts=64, top_k=4)).save(stats)
    text = run("plan", stats, "--keep", 0.7, "--out", out)
    assert "45 of 64 experts" in text
    assert "advice: (vllm, sglang) 45 experts is not a multiple of 8" in text
    assert "advice" not in run("plan", stats, "--keep", 0.5, "--out", out, "--force")
    assert "advice" not in run("plan", stats, "--keep", 0.7, "--out", out, "--force", "--quiet")


def test_plan_without_groups(tmp_path):
    stats, out = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    fake_stats(facts(num_experts=16, top_k=4, n_group=4, topk_group=2)).save(stats)
    text = run("plan", stats, "--keep-experts", 8, "--no-groups", "--out", out)
    assert "warning: group-limited routing is turned off" in text
    assert Plan.load(out).n_group == 1


def test_export_tells_what_the_pruned_model_loses(deepseek, tmp_path):
    path = tmp_path / "plan.json"
    random_plan(open_source(deepseek).facts, keep=12, top_k=3).save(path)
    text = run("export", deepseek, "--plan", path, "--out", tmp_path / "out", "--dry-run")
    assert "advice: (vllm, sglang) 12 experts is not a multiple of 8" in text
    assert "topk_method" not in text  # the original lacks it, too
    random_plan(open_source(deepseek).facts, keep=16, top_k=3).save(path)
    assert "advice" not in run("export", deepseek, "--plan", path, "--out", tmp_path / "out", "--dry-run")


def test_the_help_has_an_example():
    assert "Example: moeprune check" in run("check", "--help")


def test_a_model_of_the_hub_is_checked_without_a_download(hub: FakeHub, tmp_path):
    source = save("mixtral", tmp_path / "model")
    hub.add("org/model", source)
    assert run("check", "org/model", "--json") == run("check", source, "--json")
    random_plan(open_source(source).facts, keep=4, top_k=2).save(tmp_path / "plan.json")
    plan = ["check", tmp_path / "plan.json", "--engine", "vllm", "--json", "--model"]
    assert run(*plan, "org/model") == run(*plan, source)
    assert hub.bytes_of() and None not in [wanted for _, wanted in hub.bytes_of()]


def test_a_gguf_file_is_told_apart_from_a_plan(tmp_path):
    with pytest.raises(DeployError, match=r"which a GGUF file has not\. Check the plan, with --engine llama\.cpp"):
        run("check", tmp_path / "model.gguf")


def test_a_plan_says_which_errors_it_could_not_look_for(tmp_path):
    fake_stats(facts(num_experts=64, top_k=4)).save(tmp_path / "stats")
    command = ["plan", tmp_path / "stats", "--keep", "0.5", "--force", "--out", tmp_path / "plan.json"]
    text = run(*command, "--for", "vllm", "--tp", "7")
    assert (
        "advice: not checked, because it is not in the statistics: tp-cuts-experts. Run `moeprune check` with" in text
    )
    assert "not checked" not in run(*command, "--for", "vllm")
    assert "not checked" not in run(*command)
