"""The plan file: read as it was written, fit for people, and refused when it contradicts itself."""

import json

import pytest

from moeprune.errors import PlanError
from moeprune.plan.plan import LayerPlan, Plan
from tests.fake_stats import facts

UNIFORM = "the plan says 4. config.json has room for one number only, so every layer keeps the same."
KEEP = {"model.layers.1": (0, 2, 3, 9), "model.layers.2": (1, 4, 5, 8)}


def plan(keep=KEEP, *, model=None, num_experts=4, top_k=2, **more) -> Plan:
    layers = tuple(LayerPlan(layer=name, keep=ids) for name, ids in keep.items())
    return Plan(model=model or facts(), num_experts=num_experts, top_k=top_k, layers=layers, **more)


def refused(plan: Plan, *arguments) -> str:
    with pytest.raises(PlanError) as error:
        plan.check(*arguments)
    return str(error.value)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    made = plan(method={"score": "reap", "domains": {"größe": 0.5}, "seed": 3}, warnings=("one", "two"))
    made.save(tmp_path / "folder" / "plan.json")
    loaded = Plan.load(tmp_path / "folder" / "plan.json")
    assert loaded == made
    assert loaded.sha256 == made.sha256
    assert loaded.keep == KEEP


def test_the_file_has_one_line_a_layer(tmp_path):
    plan().save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "keep" in line] == [
        '    {"layer": "model.layers.1", "keep": [0, 2, 3, 9]},',
        '    {"layer": "model.layers.2", "keep": [1, 4, 5, 8]}',
    ]
    assert '  "num_experts": 4,' in lines and '  "top_k": 2,' in lines
    assert lines[0] == "{" and lines[-1] == "}"


def test_a_model_called_at_does_not_swallow_the_layers(tmp_path):
    """The layers once replaced every "@" of the file."""
    made = plan(model=facts(name="@"), method={"domains": {"@": 1.0}}, warnings=("@",))
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made


def test_the_hash_depends_on_the_content_not_on_the_formatting(tmp_path):
    made = plan()
    made.save(tmp_path / "plan.json")
    values = json.loads((tmp_path / "plan.json").read_text())
    reordered = dict(reversed(values.items()))
    (tmp_path / "other.json").write_text(json.dumps(reordered, indent=7))
    assert Plan.load(tmp_path / "other.json").sha256 == made.sha256
    other = KEEP | {"model.layers.1": (0, 2, 3, 8)}
    assert plan(other).sha256 != made.sha256 != plan(top_k=1).sha256


def test_a_missing_file(tmp_path):
    path = tmp_path / "none.json"
    with pytest.raises(PlanError) as error:
        Plan.load(path)
    assert str(error.value) == f"{path}: no such plan. `moeprune plan STATS --keep 0.75 --out {path}` makes one."


def edited(tmp_path, change) -> str:
    """The refusal of a saved plan after ``change`` was made to its values."""
    path = tmp_path / "plan.json"
    plan().save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(PlanError) as error:
        Plan.load(path)
    return str(error.value).removeprefix(f"{path}: not a plan that this version of moeprune reads: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(topk=2), "topk: Extra inputs are not permitted."),
        (lambda v: v["layers"][1].update(drop=[3]), "layers.1.drop: Extra inputs are not permitted."),
        (lambda v: v["model"].update(size=2), "model.size: Extra inputs are not permitted."),
        (lambda v: v["model"]["routing"].update(n_groups=2), "model.routing.n_groups: Extra inputs are not permitted."),
        (lambda v: v.update(format=2), "format: Input should be 1."),
        (lambda v: v.pop("top_k"), "top_k: Field required."),
        (
            lambda v: v["layers"][0].update(keep=[]),
            "layers.0.keep: Tuple should have at least 1 item after validation, not 0.",
        ),
        (
            lambda v: v["layers"][0].update(keep=[0, 1, 2, "x"]),
            "layers.0.keep.3: Input should be a valid integer.",
        ),
        (lambda v: v["layers"][0].update(keep=[0, True, 3, 9]), "layers.0.keep.1: Input should be a valid integer."),
        (lambda v: v["layers"][0].update(keep=[0, 2.0, 3, 9]), "layers.0.keep.1: Input should be a valid integer."),
        (lambda v: v.update(top_k=True), "top_k: Input should be a valid integer."),
        (lambda v: v.update(num_experts="4"), "num_experts: Input should be a valid integer."),
        (lambda v: v["model"]["routing"].update(topk_group=0), "the plan's model cannot use 0 of 1 expert groups."),
        (lambda v: v["model"]["routing"].update(topk_group=2), "the plan's model cannot use 2 of 1 expert groups."),
    ],
)
def test_a_plan_edited_into_something_else(tmp_path, change, message):
    assert edited(tmp_path, change) == message


def test_a_plan_edited_to_wrong_ids_is_refused_when_it_is_read(tmp_path):
    assert edited(tmp_path, lambda v: v["layers"][0].update(keep=[0, 2, 3, 10])) == (
        "model.layers.1: expert 10 does not exist, the model has experts 0 to 9."
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "keep: 3", '"text"'])
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError) as error:
        Plan.load(path)
    assert str(error.value).startswith(f"{path}: not a plan that this version of moeprune reads: the file: ")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ((2, 0, 3, 9), "kept expert ids must ascend without repetition, got [2, 0, 3, 9] (4)."),
        ((0, 2, 2, 9), "kept expert ids must ascend without repetition, got [0, 2, 2, 9] (4)."),
        ((-1, 2, 3, 9), "expert -1 does not exist, the model has experts 0 to 9."),
        ((0, 2, 3, 10), "expert 10 does not exist, the model has experts 0 to 9."),
        (
            (0, 2, 3),
            f"keeps 3 experts, {UNIFORM}",
        ),
        (
            (0, 1, 2, 3, 4, 5),
            f"keeps 6 experts, {UNIFORM}",
        ),
        ((5, 4, 3, 2, 1, 0), "kept expert ids must ascend without repetition, got [5, 4, 3, 2, ...] (6)."),
    ],
)
def test_refused_layers(keep, message):
    assert refused(plan(KEEP | {"model.layers.2": keep})) == f"model.layers.2: {message}"


def test_groups_that_keep_different_numbers():
    model = facts(num_experts=12, top_k=2, n_group=3, topk_group=2)
    keep = {"model.layers.1": (0, 1, 4, 5, 8, 9), "model.layers.2": (0, 1, 2, 4, 8, 9)}
    assert refused(plan(keep, model=model, num_experts=6)) == (
        "model.layers.2: keeps [3, 1, 2] experts of its 3 groups; group-limited routing needs the same number "
        "from each. To choose across groups, plan with --no-groups."
    )
    plan(keep | {"model.layers.2": (2, 3, 6, 7, 10, 11)}, model=model, num_experts=6).check()


@pytest.mark.parametrize(
    ("edited", "what"), [({"topk_group": 3}, "usable expert groups 3"), ({"group_score": "max"}, "a group score max")]
)
def test_a_plan_whose_groups_were_edited_to_pass(edited, what):
    """More usable groups than there are would let a top-k through that the model cannot route to."""
    model = facts(num_experts=12, top_k=3, n_group=3, topk_group=1)
    keep = dict.fromkeys(KEEP, (0, 1, 4, 5, 8, 9))
    routing = model.routing.model_copy(update=edited)
    tampered = plan(keep, model=model.model_copy(update={"routing": routing}), num_experts=6)
    assert refused(tampered, model).startswith(f"the plan was made for a model with {what}, tiny has ")


def test_layers_that_are_not_those_of_the_model():
    expected = "the model has experts in [model.layers.1, model.layers.2] (2)."
    first, second = KEEP.items()
    assert refused(plan(dict([first]))) == f"the plan lists layers [model.layers.1] (1), {expected}"
    assert refused(plan(dict([second, first]))) == (
        f"the plan lists layers [model.layers.2, model.layers.1] (2), {expected}"
    )


def test_counts_are_checked_with_the_layers():
    assert refused(plan(top_k=4)) == "cannot use 4 active experts: expected 1 to 3, the top-k of tiny."


def test_a_plan_for_another_model():
    other = facts(name="/models/other", fingerprint="cd" * 32)
    assert refused(plan(), other) == (
        "the plan was made for tiny (abababababab), this is /models/other (cdcdcdcdcdcd): other weights or another "
        "config. Calibrate and plan for this model."
    )
    plan().check(facts(name="the same weights elsewhere"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (facts(num_experts=12), "experts a layer 10, tiny has 12."),
        (facts(top_k=2), "active experts 3, tiny has 2."),
        (facts(n_group=2), "expert groups 1, tiny has 2."),
        (facts().model_copy(update={"model_type": "olmoe"}), "model type qwen3_moe, tiny has olmoe."),
        (facts().model_copy(update={"top_k_fixed": True}), "a fixed top-k: False, tiny has True."),
        (
            facts(num_layers=3),
            "expert layers [model.layers.1, model.layers.2] (2), tiny has "
            "[model.layers.1, model.layers.2, model.layers.3] (3).",
        ),
    ],
)
def test_a_plan_whose_model_was_edited(model, message):
    assert refused(plan(), model) == f"the plan was made for a model with {message}"
