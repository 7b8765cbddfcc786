"""Models on the Hub, against a server that speaks its protocol."""

from __future__ import annotations

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from huggingface_hub import constants, snapshot_download
from typer.testing import CliRunner

from moeprune.checkpoint import hub as hub_module
from moeprune.checkpoint.folder import open_checkpoint, resolve_model
from moeprune.checkpoint.header import read_header
from moeprune.checkpoint.hub import SAMPLE_BYTES, Located, locate, split_id
from moeprune.cli import app
from moeprune.errors import CheckpointError
from tests.fake_hub import COMMIT, OTHER_COMMIT, FakeHub, hub
from tests.models import FAMILIES, save

__all__ = ["hub"]  # a fixture


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> Path:
    """A checkpoint of shards much larger than the samples of a fingerprint."""
    folder = tmp_path_factory.mktemp("large") / "model"
    config = FAMILIES["mixtral"]()
    config.hidden_size, config.intermediate_size = 256, 512
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="4MB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("other weights")
    return folder


def error_of(model: str) -> str:
    with pytest.raises(CheckpointError) as error:
        locate(model)
    return str(error.value)


# Names


def test_a_name_may_carry_a_revision():
    assert split_id("owner/name") == ("owner/name", None)
    assert split_id("owner/name@v1.0") == ("owner/name", "v1.0")


@pytest.mark.parametrize("model", ["/no/such/folder", "./out/model", "a/b/c", "some-long-name"])
def test_what_is_neither_a_folder_nor_a_name_of_the_hub(model):
    expected = f"{model}: no such folder. Give the folder of a checkpoint, a Hub id (owner/name) or 'demo'."
    assert error_of(model) == expected
    with pytest.raises(CheckpointError) as error:
        resolve_model(model)
    assert str(error.value) == expected


def test_a_folder_is_where_it_is(tmp_path):
    assert locate(tmp_path) == locate(str(tmp_path)) == Located(tmp_path)
    assert locate("demo") == Located(resolve_model("demo"))


# The ends of the shards


def test_headers_and_fingerprint_need_no_download(hub: FakeHub, large):
    hub.add("org/model", large)
    found = locate("org/model")
    here, there = open_checkpoint(found.folder), open_checkpoint(large)
    assert here.fingerprint() == there.fingerprint()
    assert {name: (t.dtype, t.shape, t.start, t.end) for name, t in here.tensors.items()} == {
        name: (t.dtype, t.shape, t.start, t.end) for name, t in there.tensors.items()
    }
    assert here.metadata == there.metadata and here.config == there.config
    assert (found.repo, found.commit) == ("org/model", COMMIT)
    assert found.missing == {shard.name: shard.stat().st_size for shard in there.shards}
    served = [wanted for _, wanted in hub.bytes_of()]
    assert None not in served, "no shard was asked for as a whole"
    num_bytes = sum(int(b) - int(a) + 1 for a, b in (str(w).removeprefix("bytes=").split("-") for w in served))
    assert num_bytes == len(there.shards) * (hub_module.FIRST_BYTES + SAMPLE_BYTES)
    assert not any(path.startswith("/api") and "pytorch" in path for _, _, path, _, _ in hub.requests)


def test_what_is_missing_takes_no_room(hub: FakeHub, large):
    hub.add("org/model", large)
    found = locate("org/model")
    if not hasattr(os, "SEEK_HOLE"):
        pytest.skip("no sparse files here")
    for name, size in found.missing.items():
        assert (found.folder / name).stat().st_size == size > 2_000_000
        assert (found.folder / name).stat().st_blocks * 512 < 500_000


def test_small_files_are_there_and_other_weights_are_not(hub: FakeHub, large):
    hub.add("org/model", large)
    folder = locate("org/model").folder
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert json.loads((folder / "config.json").read_text()) == json.loads((large / "config.json").read_text())
    assert not (folder / "pytorch_model.bin").exists()


def test_a_header_longer_than_the_first_request(hub: FakeHub, large, monkeypatch):
    monkeypatch.setattr(hub_module, "FIRST_BYTES", 100)
    hub.add("org/model", large)
    assert open_checkpoint(locate("org/model").folder).fingerprint() == open_checkpoint(large).fingerprint()


def test_shards_smaller_than_the_samples(hub: FakeHub, tmp_path):
    folder = save("mixtral", tmp_path / "model", shard="30KB")
    hub.add("org/model", folder)
    assert open_checkpoint(locate("org/model").folder).fingerprint() == open_checkpoint(folder).fingerprint()


def test_a_model_of_one_file(hub: FakeHub, tmp_path):
    folder = save("mixtral", tmp_path / "model")
    hub.add("org/model", folder)
    found = locate("org/model")
    assert found.missing.keys() == {"model.safetensors"}
    assert open_checkpoint(found.folder).fingerprint() == open_checkpoint(folder).fingerprint()


def test_nothing_is_fetched_twice(hub: FakeHub, large):
    hub.add("org/model", large)
    first = locate("org/model")
    hub.requests.clear()
    assert locate("org/model") == first
    assert hub.bytes_of() == []


def test_a_revision_is_followed_to_its_commit(hub: FakeHub, large, tmp_path):
    hub.add("org/model", large)
    hub.add("org/model", save("mixtral", tmp_path / "old"), commit=OTHER_COMMIT, revision="v1")
    old, new = locate("org/model@v1"), locate("org/model@main")
    assert (old.commit, new.commit) == (OTHER_COMMIT, COMMIT)
    assert old.folder != new.folder
    assert locate(f"org/model@{OTHER_COMMIT}") == old


def test_shards_in_the_cache_are_read_there(hub: FakeHub, large):
    hub.add("org/model", large)
    name = "model-00002-of-00006.safetensors"
    assert (large / name).is_file()
    cached = huggingface_hub.hf_hub_download("org/model", name)
    hub.requests.clear()
    found = locate("org/model")
    assert name not in found.missing
    assert (found.folder / name).resolve() == Path(cached).resolve()
    assert name not in {asked for asked, _ in hub.bytes_of()}
    Path(cached).unlink()  # the cache was cleaned
    assert name in locate("org/model").missing
    assert open_checkpoint(locate("org/model").folder).fingerprint() == open_checkpoint(large).fingerprint()


def test_a_model_that_is_in_the_cache_as_a_whole(hub: FakeHub, large):
    hub.add("org/model", large)
    folder = snapshot_download("org/model")
    assert locate("org/model") == Located(Path(folder), "org/model", COMMIT)


# Without a connection


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no server"])
def test_a_cached_model_is_found_without_a_connection(hub: FakeHub, large, monkeypatch, how):
    hub.add("org/model", large)
    folder = snapshot_download("org/model")
    if how == "no server":
        hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how != "no server")
    assert locate("org/model") == Located(Path(folder), "org/model", COMMIT)
    assert resolve_model("org/model") == Path(folder)


@pytest.mark.parametrize("cached", ["nothing", "config", "one shard"])
def test_a_model_that_is_not_all_in_the_cache_is_refused_without_a_connection(hub: FakeHub, large, monkeypatch, cached):
    hub.add("org/model", large)
    if cached != "nothing":
        patterns = ["*.json"] if cached == "config" else ["*.json", "model-00001-*"]
        snapshot_download("org/model", allow_patterns=patterns)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert error_of("org/model") == (
        "org/model: not in the local cache, and the Hub cannot be reached (offline, or HF_HUB_OFFLINE=1)."
    )


# What the Hub refuses


def test_no_such_repository(hub: FakeHub):
    text = "no local folder, and no such repository on the Hub. If it is private, log in with `hf auth login`."
    assert error_of("org/nothing") == f"org/nothing: {text}"
    with pytest.raises(CheckpointError) as error:
        resolve_model("org/nothing")
    assert str(error.value) == f"org/nothing: {text}"


def test_a_gated_repository(hub: FakeHub, large):
    hub.add("org/model", large)
    hub.gated.add("org/model")
    text = "is gated. Ask for access at https://huggingface.co/org/model, then log in with `hf auth login`."
    assert error_of("org/model") == f"org/model: {text}"


def test_a_token_opens_a_gated_repository_and_does_not_leave_the_hub(hub: FakeHub, large, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add("org/model", large)
    hub.gated.add("org/model")
    locate("org/model")
    sent = {(server, token) for server, _, _, _, token in hub.requests}
    assert sent == {("hub", "Bearer hf_secret"), ("store", None)}


def test_no_such_revision(hub: FakeHub, large):
    hub.add("org/model", large)
    assert error_of("org/model@v9") == "org/model@v9: org/model has no branch, tag or commit 'v9'."


def test_a_name_that_the_hub_cannot_have(hub: FakeHub):
    assert error_of("org/a name").startswith("org/a name: not a name that the Hub has (Repo id must")


def test_what_the_hub_forbids_is_not_taken_for_a_missing_connection(hub: FakeHub, large):
    hub.add("org/model", large)
    hub.forbidden.add("tokenizer.json")
    text = "not in the local cache, and the Hub did not answer as expected (403 Forbidden: NotAllowed.)."
    assert error_of("org/model") == f"org/model: {text}"


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_hub(hub: FakeHub, large, tmp_path, monkeypatch):
    hub.add("org/model", large)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    text = error_of("org/model")
    assert text.startswith(f"org/model: {tmp_path / 'file'}")
    assert text.endswith("Not a directory. Make room there, or set HF_HOME to a folder that can be written to.")


def test_a_server_that_sends_whole_files_is_not_read_to_its_end(hub: FakeHub, large, monkeypatch):
    hub.add("org/model", large)
    hub.ignore_ranges = True
    text = error_of("org/model")
    assert text.endswith("does not answer requests for a part of a file. Download the model first.")


def test_a_line_that_breaks_is_tried_again(hub: FakeHub, large):
    hub.add("org/model", large)
    broken: set[str] = set()

    def cut(server: str, method: str, path: str) -> None:
        if server == "store" and path not in broken:
            broken.add(path)
            raise ConnectionError

    hub.before = cut
    assert open_checkpoint(locate("org/model").folder).fingerprint() == open_checkpoint(large).fingerprint()
    assert len(broken) == len(list(large.glob("*.safetensors")))


def test_a_line_that_stays_broken(hub: FakeHub, large):
    hub.add("org/model", large)

    def cut(server: str, method: str, path: str) -> None:
        if server == "store":
            raise ConnectionError

    hub.before = cut
    text = error_of("org/model")
    assert text.startswith("org/model: the Hub did not answer as expected (")
    assert text.endswith("Try again.")


def test_a_pickle_on_the_hub_is_named(hub: FakeHub, tmp_path):
    folder = save("mixtral", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.add("org/model", folder)
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin\. It is a pickle"):
        open_checkpoint(locate("org/model").folder)


def test_a_damaged_header_is_refused_as_on_disk(hub: FakeHub, tmp_path):
    folder = save("mixtral", tmp_path / "model")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[:8] = (1 << 40).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(data)
    hub.add("org/model", folder)
    with pytest.raises(CheckpointError) as there:
        read_header(folder / "model.safetensors")
    found = locate("org/model").folder
    with pytest.raises(CheckpointError) as here:
        open_checkpoint(found)
    assert str(here.value) == str(there.value).replace(str(folder), str(found))


# Whole downloads


def test_a_whole_download_takes_no_other_formats(hub: FakeHub, large):
    hub.add("org/model", large)
    folder = resolve_model("org/model")
    assert {path.name for path in folder.iterdir()} == {path.name for path in large.iterdir()} - {"pytorch_model.bin"}
    assert open_checkpoint(folder).fingerprint() == open_checkpoint(large).fingerprint()
    assert resolve_model(f"org/model@{COMMIT}") == folder


def test_inspecting_needs_no_download(hub: FakeHub, large):
    hub.add("org/model", large)
    answers = [CliRunner().invoke(app, ["inspect", model, "--json"]) for model in ("org/model", str(large))]
    assert [answer.exit_code for answer in answers] == [0, 0]
    there, here = (json.loads(answer.stdout) for answer in answers)
    assert there | {"path": ""} == here | {"path": ""}
    assert None not in [wanted for _, wanted in hub.bytes_of()]
