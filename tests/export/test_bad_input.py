"""Input that cannot be exported: a clear error, and nothing written, not even a folder."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from moeprune.errors import CheckpointError, MoePruneError, PlanError, UnsupportedModelError
from moeprune.export.export import export_checkpoint
from moeprune.export.verify import verify_checkpoint
from moeprune.plan.plan import Plan
from tests.models import COMMON, save
from tests.pruning import all_bytes, edit_config, edit_tensors, plan_for, random_plan

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A checkpoint of one file, the same in shards, and a plan file for either."""
    folder = tmp_path_factory.mktemp("good")
    single, sharded = save("mixtral", folder / "single"), save("mixtral", folder / "sharded", shard="30KB")
    plan_for(single, "mixtral").save(folder / "single.json")
    plan_for(sharded, "mixtral").save(folder / "sharded.json")
    return single, sharded, folder


def refused(source: Path, plan: Path, tmp_path: Path, **options: Any) -> MoePruneError:
    """The error of an export; nothing may have changed on disk."""
    before = all_bytes(tmp_path)
    folders = {path for path in tmp_path.rglob("*") if path.is_dir()}
    with pytest.raises(MoePruneError) as error:
        export_checkpoint(source, plan=Plan.load(plan), out=tmp_path / "deep" / "out", quiet=True, **options)
    assert all_bytes(tmp_path) == before
    assert {path for path in tmp_path.rglob("*") if path.is_dir()} == folders
    return error.value


def edit_header(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def entries(header: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for name, entry in header.items() if name != "__metadata__"]


def cut(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1])


def cut_in_header(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:100])


def lengthen(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes() + b"\0")


def overlap(folder: Path) -> None:
    def edit(header):
        first, second, *_ = sorted(entries(header), key=lambda entry: entry["data_offsets"])
        second["data_offsets"], second["shape"] = first["data_offsets"], first["shape"]

    edit_header(folder / SINGLE, edit)


def beyond(folder: Path) -> None:
    def edit(header):
        last = max(entries(header), key=lambda entry: entry["data_offsets"])
        start, end = last["data_offsets"]
        last["data_offsets"], last["shape"], last["dtype"] = [start, end + 4], [end + 4 - start], "U8"

    edit_header(folder / SINGLE, edit)


def two_gigabytes(folder: Path) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", 2 << 30) + b"{}")


def wrong_dtype(folder: Path) -> None:
    edit_header(folder / SINGLE, lambda header: header[ROUTER].update(dtype="F16"))


def no_dtype(folder: Path) -> None:
    edit_header(folder / SINGLE, lambda header: header[ROUTER].update(dtype="Q4_K"))


def integers(folder: Path) -> None:
    edit_header(folder / SINGLE, lambda header: header[ROUTER].update(dtype="I32"))


def integers_of_one_expert(folder: Path) -> None:
    edit_header(folder / SINGLE, lambda header: header[EXPERT].update(dtype="U32"))


def one_expert_transposed(folder: Path) -> None:
    edit_header(folder / SINGLE, lambda header: header[EXPERT]["shape"].reverse())


def repeat_key(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    text = data[8:end].rstrip()
    key = json.dumps(ROUTER).encode()
    text = b"{" + key + b":" + json.dumps(json.loads(text)[ROUTER]).encode() + b"," + text[1:]
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def repeat_config_key(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"num_local_experts": 8,', 1))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def pickled_under_a_wrong_name(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").rename(folder / SINGLE)


def more_experts(folder: Path) -> None:
    edit_config(folder, num_local_experts=8)


def fewer_experts(folder: Path) -> None:
    edit_config(folder, num_local_experts=4)


def more_active_experts(folder: Path) -> None:
    edit_config(folder, num_experts_per_tok=7)


def other_width(folder: Path) -> None:
    edit_config(folder, intermediate_size=28)


def nan_row(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[ROUTER][4].fill_(float("nan")))


def one_infinity(folder: Path) -> None:
    def edit(tensors):
        tensors[ROUTER] = tensors[ROUTER].bfloat16()
        tensors[ROUTER][5, 31] = -float("inf")

    edit_tensors(folder, edit)


def damaged_manifest(folder: Path) -> None:
    (folder / "moeprune.json").write_text("{")


def damaged_quantisation(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_bytes(b"\xff")


SINGLE_FILE = [
    (damaged_manifest, CheckpointError, r"moeprune\.json: not JSON \(Expecting"),
    (damaged_quantisation, CheckpointError, r"hf_quant_config\.json: not JSON \('utf-8'"),
    (cut, CheckpointError, rf"{SINGLE}: tensor '.*' ends at byte \d+, the file at \d+\. Download it again\."),
    (cut_in_header, CheckpointError, rf"{SINGLE}: not a complete safetensors file \(100 bytes, .*Download it again\."),
    (lengthen, CheckpointError, rf"{SINGLE}: its tensors end at byte \d+, the file at \d+\. Download it again\."),
    (overlap, CheckpointError, rf"{SINGLE}: tensors '.*' and '.*' overlap\."),
    (beyond, CheckpointError, rf"{SINGLE}: tensor '.*' ends at byte \d+, the file at \d+\. Download it again\."),
    (two_gigabytes, CheckpointError, rf"{SINGLE}: not a complete .* header length 2147483648\). Download it again\."),
    (wrong_dtype, CheckpointError, rf"{SINGLE}: tensor '{ROUTER}', F16 \[6, 32\], does not fit into bytes"),
    (no_dtype, CheckpointError, rf"{SINGLE}: tensor '{ROUTER}' has the unknown dtype 'Q4_K'\. Known: \["),
    (integers, CheckpointError, rf"'{ROUTER}' is stored as I32, and config\.json has no quantization_config"),
    (
        integers_of_one_expert,
        CheckpointError,
        r"experts\.\*\.w1\.weight' is stored as U32, and config\.json has no quant",
    ),
    (one_expert_transposed, CheckpointError, r"w1\.weight' is stored as .*24, 32.* and .*32, 24\] \(expert 2\)"),
    (repeat_key, CheckpointError, rf"{SINGLE}: .*the key '{ROUTER}' is given more than once"),
    (repeat_config_key, CheckpointError, r"config\.json: .*the key 'num_local_experts' is given more than once"),
    (
        pickled,
        CheckpointError,
        r"found pytorch_model\.bin\. It is a pickle.*spaces/safetensors/convert.*save_pretrained",
    ),
    (
        pickled_under_a_wrong_name,
        CheckpointError,
        rf"{SINGLE}: not safetensors but a pickle.*Convert it to safetensors",
    ),
    (more_experts, MoePruneError, r"experts"),
    (fewer_experts, MoePruneError, r"experts"),
    (more_active_experts, MoePruneError, r"7"),
    (other_width, MoePruneError, r"elements"),
    (nan_row, CheckpointError, rf"{SINGLE}: expert 4 \(element \[4, 0\]\) of '{ROUTER}' is not a finite number\."),
    (
        one_infinity,
        CheckpointError,
        rf"{SINGLE}: expert 5 \(element \[5, 31\]\) of '{ROUTER}' is not a finite number\.",
    ),
]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(("damage", "kind", "message"), SINGLE_FILE, ids=[d.__name__ for d, *_ in SINGLE_FILE])
def test_a_damaged_checkpoint(good, tmp_path, damage, kind, message, dry_run):
    single, _, plans = good
    source = shutil.copytree(single, tmp_path / "source")
    plan = plans / "single.json"
    damage(source)
    if damage in (nan_row, one_infinity):  # these weights are others, so they need a plan of their own
        plan_for(source, "mixtral").save(tmp_path / "plan.json")
        plan = tmp_path / "plan.json"
    error = refused(source, plan, tmp_path, dry_run=dry_run)
    assert isinstance(error, kind)
    assert re.search(message, str(error)), str(error)
    assert str(source) in str(error), "which file or folder it is"


def test_a_missing_shard(good, tmp_path):
    _, sharded, plans = good
    source = shutil.copytree(sharded, tmp_path / "source")
    gone = sorted(source.glob("*.safetensors"))[1]
    gone.unlink()
    assert re.search(rf"1 of \d+ shards of {INDEX} are missing, first {gone.name}\. Download", str(
        refused(source, plans / "sharded.json", tmp_path)
    ))  # fmt: skip


@pytest.mark.parametrize("where", ["../{}", "{parent}/{}", "./{}", "shards/{}"])
def test_an_index_that_leads_out_of_its_folder(good, tmp_path, where):
    _, sharded, plans = good
    source = shutil.copytree(sharded, tmp_path / "source")
    index = json.loads((source / INDEX).read_text())
    home = index["weight_map"][ROUTER]
    (source / "shards").mkdir()
    shutil.copy(source / home, source / "shards" / home)
    (source / home).rename(tmp_path / home)
    target = where.format(home, parent=tmp_path)
    index["weight_map"] = {key: target if file == home else file for key, file in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps(index))
    error = refused(source, plans / "sharded.json", tmp_path)
    assert f"in {target!r}; expected the name of a .safetensors file in the same folder." in str(error)


def test_a_dense_model(good, tmp_path):
    config = transformers.Qwen3Config(**COMMON, num_hidden_layers=2, head_dim=8, intermediate_size=24)
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "source")
    error = refused(tmp_path / "source", good[2] / "single.json", tmp_path)
    assert isinstance(error, UnsupportedModelError)
    assert "expert" in str(error)


# Plans of something else


def fine_tuned(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"].mul_(1.001))


def other_config(folder: Path) -> None:
    edit_config(folder, rms_norm_eps=1e-4)


@pytest.mark.parametrize("change", [fine_tuned, other_config])
def test_a_plan_of_a_sibling(good, tmp_path, change):
    single, _, plans = good
    source = shutil.copytree(single, tmp_path / "source")
    change(source)
    error = refused(source, plans / "single.json", tmp_path)
    assert isinstance(error, PlanError)
    assert str(error).startswith(f"the plan was made for {single} (")
    assert str(error).endswith("other weights or another config. Calibrate and plan for this model.")


def test_a_plan_of_another_family(good, tmp_path):
    source = save("olmoe", tmp_path / "source")
    error = refused(source, good[2] / "single.json", tmp_path)
    assert "other weights or another config" in str(error)


def test_a_copy_of_the_model_under_another_name_is_the_same_model(good, tmp_path):
    single, _, plans = good
    source = shutil.copytree(single, tmp_path / "elsewhere")
    export_checkpoint(source, plan=Plan.load(plans / "single.json"), out=tmp_path / "out", quiet=True)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a field more": (lambda plan: plan.update(topk=1), "topk: Extra inputs are not permitted"),
    "an expert twice": (lambda plan: plan["layers"][0].update(keep=[0, 1, 1, 2]), "without repetition"),
    "an expert too many": (lambda plan: plan["layers"][0].update(keep=[0, 1, 2, 3, 4]), "keeps 5 experts"),
    "an expert from nowhere": (lambda plan: plan["layers"][0].update(keep=[0, 1, 2, 6]), "expert 6 does not exist"),
    "a layer missing": (lambda plan: plan["layers"].pop(), "the plan lists layers [model.layers.0] (1)"),
    "a layer twice": (lambda plan: plan["layers"].append(plan["layers"][0]), "every layer with experts once"),
    "a layer missing everywhere": (
        lambda plan: (plan["layers"].pop(), plan["model"]["layers"].pop()), "with expert layers [model.layers.0] (1)"
    ),
    "no layer": (lambda plan: (plan["layers"].clear(), plan["model"]["layers"].clear()), "and at least one"),
    "more experts": (lambda plan: plan["model"].update(num_experts=12), "experts a layer 12"),
    "a larger top-k": (lambda plan: plan["model"].update(top_k=4), "active experts 4"),
    "groups": (lambda plan: plan["model"]["routing"].update(n_group=2), "2 groups"),
    "no groups": (lambda plan: plan["model"]["routing"].update(n_group=0), "in 0 equal groups"),
    "NaN": (lambda plan: plan["model"]["routing"].update(scale=float("nan")), "NaN is not a number that JSON has"),
    "another format": (lambda plan: plan.update(format=9), "format: Input should be 1"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=list(EDITS))
def test_a_plan_that_was_edited(good, tmp_path, edit, message):
    single, _, plans = good
    values = json.loads((plans / "single.json").read_text())
    edit(values)
    (tmp_path / "plan.json").write_text(json.dumps(values))
    error = refused(single, tmp_path / "plan.json", tmp_path)
    assert isinstance(error, PlanError)
    assert message in str(error)


def test_a_plan_with_a_key_given_twice(good, tmp_path):
    single, _, plans = good
    text = (plans / "single.json").read_text().replace('"top_k": 1', '"top_k": 2, "top_k": 1')
    (tmp_path / "plan.json").write_text(text)
    assert "the key 'top_k' is given more than once" in str(refused(single, tmp_path / "plan.json", tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a folder, expected a plan (a JSON file)."),
        (b"", "the file: Expecting value: line 1 column 1 (char 0)."),
        (bytes(range(256)), "the file: 'utf-8' codec can't decode"),
        (b"\x93NUMPY" * 9, "the file: 'utf-8' codec can't decode"),
    ],
)
def test_a_plan_that_is_no_plan(good, tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.mkdir() if content is None else path.write_bytes(content)
    error = refused(good[0], path, tmp_path)
    assert isinstance(error, PlanError)
    assert str(error).startswith(f"{path}: ")
    assert message in str(error)


# What is no fault


def test_a_config_with_infinity_is_exported_as_it_was(good, tmp_path):
    """Nemotron-H's config.json has a number that JSON does not have; the export once failed on it in its last step."""
    source = shutil.copytree(good[0], tmp_path / "source")
    edit_config(source, time_step_limit=[0.0, float("inf")])
    plan_for(source, "mixtral").save(tmp_path / "plan.json")
    export_checkpoint(source, plan=Plan.load(tmp_path / "plan.json"), out=tmp_path / "out", quiet=True)
    text = (tmp_path / "out" / "config.json").read_text()
    assert re.search(r'"time_step_limit": \[\s+0\.0,\s+Infinity\s+\]', text)
    assert json.loads(text)["time_step_limit"] == [0.0, float("inf")]
    assert all(check.passed for check in verify_checkpoint(tmp_path / "out", quiet=True))


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_routers_of_every_layout_are_looked_at(tmp_path, family):
    from moeprune.anatomy.source import open_source

    source = save(family, tmp_path / "source")
    found = open_source(source)
    routers = {
        key: tensor for key, tensor in load_file(source / SINGLE).items()
        if re.search(r"(gate|router)\.(weight|bias|e_score_correction_bias)$", key)
    }  # fmt: skip
    assert len(routers) == len(found.anatomy.layers) * (1 if family == "qwen3_moe" else 2)
    keep, top_k = {"gpt_oss": (7, 2), "deepseek_v3": (12, 2), "qwen3_moe": (7, 2)}[family]
    for key in routers:
        damaged = shutil.copytree(source, tmp_path / key)

        def put_nan(tensors, key=key):
            tensors[key][3] = float("nan")

        edit_tensors(damaged, put_nan)
        random_plan(open_source(damaged).facts, keep=keep, top_k=top_k).save(tmp_path / "plan.json")
        assert f"expert 3 (element {[3, 0][: routers[key].ndim]}) of {key!r} is not a finite number" in str(
            refused(damaged, tmp_path / "plan.json", tmp_path)
        )
