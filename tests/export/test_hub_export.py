"""Exports of models on the Hub: what is downloaded, when it is deleted, and how a broken one goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from safetensors.torch import load_file, save_file

from moeprune.anatomy.source import open_source
from moeprune.checkpoint.hub import locate
from moeprune.errors import CheckpointError, ExportError, PlanError
from moeprune.export.export import export_checkpoint
from moeprune.export.fetch import HubSources
from moeprune.export.journal import JOURNAL
from moeprune.export.prepare import Job, prepare
from moeprune.export.verify import verify_checkpoint
from moeprune.plan.plan import Plan
from tests.checkpoint.test_hub import large
from tests.fake_hub import COMMIT, OTHER_COMMIT, FakeHub, hub
from tests.models import save
from tests.pruning import all_bytes, edit_tensors, plan_for

__all__ = ["hub", "large"]  # fixtures

NAME = "org/model"


@pytest.fixture
def plan(hub: FakeHub, large: Path) -> Plan:
    """A plan for the model on the Hub, made from its local twin."""
    hub.add(NAME, large)
    return plan_for(large, "mixtral")


@pytest.fixture
def expected(large: Path, plan: Plan, tmp_path: Path) -> dict[str, bytes]:
    """The tensors' files as an export of the local twin writes them."""
    export_checkpoint(large, plan=plan, out=tmp_path / "local", quiet=True)
    return weights(tmp_path / "local")


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in all_bytes(folder).items() if "safetensors" in name}


def export(plan: Plan, out: Path, **options) -> None:
    export_checkpoint(NAME, plan=plan, out=out, quiet=True, **options)


def prepared(plan: Plan, out: Path) -> Job:
    return prepare(NAME, plan=plan, out=out, force=False, max_bytes=None, jobs=1, link=False, keep_source=False)


def whole_downloads(hub: FakeHub) -> list[str]:
    return sorted(name for name, wanted in hub.bytes_of() if wanted is None)


def safetensors_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors") if path.exists()}


@pytest.mark.parametrize("keep_source", [True, False])
@pytest.mark.parametrize("options", [{}, {"jobs": 1}, {"max_shard_size": "1MB"}, {"max_shard_size": "9MB", "jobs": 2}])
def test_a_model_of_the_hub_gives_what_its_local_copy_gives(hub, large, plan, tmp_path, keep_source, options):
    export_checkpoint(large, plan=plan, out=tmp_path / "local", quiet=True, **options)
    export(plan, tmp_path / "out", keep_source=keep_source, **options)
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    assert whole_downloads(hub) == sorted(path.name for path in large.glob("*.safetensors")), "each shard once"
    assert all(check.passed for check in verify_checkpoint(tmp_path / "out", against=str(large), quiet=True))


def test_the_manifest_names_repository_and_commit(hub, large, plan, tmp_path):
    hub.add(NAME, large, commit=OTHER_COMMIT, revision="v1")
    export_checkpoint(f"{NAME}@v1", plan=plan, out=tmp_path / "out", quiet=True)
    manifest = json.loads((tmp_path / "out" / "moeprune.json").read_text())
    assert manifest["source"]["repo"] == NAME
    assert manifest["source"]["commit"] in {COMMIT, OTHER_COMMIT}
    assert manifest["source"]["fingerprint"] == open_source(large).facts.fingerprint


def test_downloads_stay_in_the_cache_by_default(hub, large, plan, tmp_path):
    export(plan, tmp_path / "out")
    hub.requests.clear()
    export(plan, tmp_path / "again")
    assert whole_downloads(hub) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_without_keeping_the_source_no_more_shards_than_jobs_take_up_room(hub, large, plan, tmp_path, jobs):
    at_once: list[int] = []
    lock = threading.Lock()

    def look(server: str, method: str, path: str) -> None:
        if server == "store":
            with lock:
                at_once.append(len(list((tmp_path / "out.partial" / ".source").glob("*.safetensors"))))

    hub.before = look
    export(plan, tmp_path / "out", keep_source=False, jobs=jobs)
    assert max(at_once) < jobs, "the one that is asked for comes on top"
    assert not (tmp_path / "out" / ".source").exists()
    kept = [path for path in (tmp_path / "hub-cache").rglob("*") if path.is_file() and path.stat().st_size > 1_000_000]
    assert kept == []


def test_shards_that_were_in_the_cache_are_not_deleted(hub, large, plan, tmp_path):
    folder = Path(snapshot_download(NAME, allow_patterns=["*.json", "model-00001-*"]))
    before = safetensors_below(folder)
    export(plan, tmp_path / "out", keep_source=False)
    assert safetensors_below(folder) == before == {"model-00001-of-00006.safetensors"}


def test_shards_of_which_nothing_stays_are_not_downloaded(hub, tmp_path):
    """Experts in files of their own: those of pruned experts need not travel."""
    folder = save("mixtral", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"{name}.safetensors" for name in tensors}
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    hub.add(NAME, folder)
    export(plan_for(folder, "mixtral"), tmp_path / "out")
    assert len(whole_downloads(hub)) == len(tensors) - 2 * 2 * 3, "two of six experts in two layers, three files each"
    assert all(check.passed for check in verify_checkpoint(tmp_path / "out", against=str(folder), quiet=True))


def test_a_dry_run_downloads_no_weights_and_says_how_much_would_be(hub, large, plan, tmp_path):
    summary = export_checkpoint(NAME, plan=plan, out=tmp_path / "out", quiet=True, dry_run=True)
    assert whole_downloads(hub) == []
    assert summary.to_download == sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert not (tmp_path / "out.partial").exists()


# Refused before anything is downloaded


def test_a_plan_for_other_weights(hub, large, plan, tmp_path):
    other = save("mixtral", tmp_path / "other")
    with pytest.raises(PlanError, match="the plan was made for"):
        export(plan_for(other, "mixtral"), tmp_path / "out")
    assert whole_downloads(hub) == []


@pytest.mark.parametrize("keep_source", [True, False])
def test_a_disk_without_room_for_the_downloads(hub, large, plan, tmp_path, monkeypatch, keep_source):
    summary = export_checkpoint(NAME, plan=plan, out=tmp_path / "out", quiet=True, dry_run=True)
    usage = namedtuple("usage", "total used free")
    largest = max(path.stat().st_size for path in large.glob("*.safetensors"))
    needed = summary.sizes.bytes_after + (summary.to_download if keep_source else 2 * largest)
    options = {"keep_source": keep_source, "jobs": 2, "dry_run": True}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    export(plan, tmp_path / "out", **options)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(ExportError) as error:
        export(plan, tmp_path / "out", **options)
    assert ("--no-keep-source" in str(error.value)) is keep_source


def test_downloads_of_an_earlier_attempt_are_not_asked_room_for_twice(hub, large, plan, tmp_path, monkeypatch):
    """A disk of just the size that the first attempt needed is large enough for the second."""
    out = tmp_path / "out"
    needed = room_needed(plan, out, monkeypatch)
    kill_while_copying(plan, out)
    downloaded = out.with_name("out.partial") / ".source" / "model-00001-of-00006.safetensors"
    small_files = 100_000
    assert -4096 <= needed - downloaded.stat().st_blocks * 512 - room_needed(plan, out, monkeypatch) < small_files


def room_needed(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The bytes that must be free, found by halving, to a block."""
    usage = namedtuple("usage", "total used free")
    least, enough = 0, 1 << 26
    while least + 4096 < enough:
        free = (least + enough) // 2
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
            try:
                export(plan, out, keep_source=False, jobs=1, dry_run=True)
                enough = free
            except ExportError:
                least = free + 1
    return enough


def test_a_router_with_nan_is_found_when_its_shard_arrives(hub, tmp_path):
    folder = save("mixtral", tmp_path / "model")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.gate.weight"][2, 3] = torch.nan

    edit_tensors(folder, damage)
    plan = plan_for(folder, "mixtral")
    hub.add(NAME, folder)
    with pytest.raises(CheckpointError, match=r"expert 2 \(element \[2, 3\]\).*is not a finite number"):
        export(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Broken lines


def kill_while_copying(plan: Plan, out: Path) -> None:
    """An export that ends when the first download is complete and its output file is not."""

    class Killed(BaseException):
        """Stands for a signal."""

    def die(*args):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeprune.export.copying.Appender._copy_large", die)
        with pytest.raises(Killed):
            export(plan, out, keep_source=False, jobs=1)


@pytest.mark.parametrize("keep_source", [True, False])
def test_a_line_that_breaks_in_the_middle_goes_on_where_it_was(hub, large, plan, expected, tmp_path, keep_source):
    served: list[str] = []

    def cut(server: str, method: str, path: str) -> None:
        if method == "GET" and path.endswith(".safetensors") and server == "store":
            served.append(path)
            if len(served) > 3:
                raise ConnectionError

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    export_checkpoint(NAME, plan=plan, out=out, quiet=True, dry_run=True)
    hub.before = cut
    with pytest.raises(ExportError) as error:
        export(plan, out, keep_source=keep_source, jobs=1)
    assert str(error.value).startswith("model-00004-of-00006.safetensors: org/model: ")
    assert str(error.value).endswith("Finished shards are kept; run the same command again.")
    entered = json.loads((partial / JOURNAL).read_text())["shards"]
    finished = {name: (partial / name).stat().st_ino for name in entered}
    assert len(finished) == 3
    hub.before = lambda server, method, path: None
    hub.requests.clear()
    export(plan, out, keep_source=keep_source, jobs=1)
    assert whole_downloads(hub) == [f"model-{n:05d}-of-00006.safetensors" for n in (4, 5, 6)]
    assert {name: (out / name).stat().st_ino for name in finished} == finished
    assert weights(out) == expected


def test_a_complete_download_survives_a_kill_before_its_shard_was_written(hub, large, plan, expected, tmp_path):
    out = tmp_path / "out"
    kill_while_copying(plan, out)
    assert whole_downloads(hub) == ["model-00001-of-00006.safetensors"]
    hub.requests.clear()
    export(plan, out, keep_source=False, jobs=1)
    assert whole_downloads(hub) == [f"model-{n:05d}-of-00006.safetensors" for n in range(2, 7)]
    assert weights(out) == expected


def test_a_server_that_fails_now_and_then_ends_nothing(hub, large, plan, expected, tmp_path):
    """huggingface_hub tries again when a line breaks, and not when a download is answered with an error."""
    hub.failing = {path.name for path in large.glob("*.safetensors")}
    export(plan, tmp_path / "out", keep_source=False, jobs=2)
    assert hub.failing == set()
    assert weights(tmp_path / "out") == expected


@pytest.mark.parametrize("jobs", [1, 2])
def test_halves_of_downloads_that_a_kill_left_are_gone_before_more_is_downloaded(hub, large, plan, tmp_path, jobs):
    """huggingface_hub gives each attempt a name of its own, and never takes one up again."""
    out, downloads = tmp_path / "out", tmp_path / "out.partial" / ".source"
    kill_while_copying(plan, out)
    half = downloads / ".cache" / "huggingface" / "download" / "name.sha.1234.incomplete"
    half.write_bytes(bytes(1000))
    unwanted = downloads / "model-00009-of-00009.safetensors"
    unwanted.write_bytes(bytes(1000))
    there: list[bool] = []
    hub.before = lambda server, method, path: there.append(half.exists() or unwanted.exists())
    hub.requests.clear()
    export(plan, out, keep_source=False, jobs=jobs)
    assert hub.bytes_of() and not there[-1], "the first requests are those that look at headers"
    first = next(n for n, request in enumerate(hub.requests) if request[0] == "store" and request[3] is None)
    assert not any(there[first:])


@pytest.mark.parametrize("keep_source", [True, False])
def test_a_download_from_xet_that_fails_is_told_in_a_line(hub, large, plan, tmp_path, monkeypatch, keep_source):
    """hf_xet raises RuntimeError whatever happens."""

    def fail(**options):
        raise RuntimeError("Task error: CAS Client Error: error sending request")

    hub.xet = True
    monkeypatch.setattr("huggingface_hub.file_download.xet_get", fail)
    with pytest.raises(ExportError) as error:
        export(plan, tmp_path / "out", keep_source=keep_source, jobs=1)
    assert str(error.value) == (
        "model-00001-of-00006.safetensors: org/model: the Hub did not answer as expected (Task error: CAS Client "
        "Error: error sending request). Try again. Finished shards are kept; run the same command again."
    )


def test_a_file_that_needs_hf_xet_without_hf_xet(hub, large, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 1_000_000)
    with pytest.raises(ExportError, match=r"The file is too large .* Install `hf_xet`"):
        export(plan, tmp_path / "out", jobs=1)


def slowly(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]
        threading.Event().wait(0.01)  # not time.sleep, which the fixture skips


def test_an_error_ends_the_downloads_of_the_other_shards(hub, large, plan, tmp_path, monkeypatch):
    """A download of 5 GB would otherwise be finished before the error is told, and Ctrl-C be of no use."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    begun, sent = threading.Event(), []

    def pieces(data: bytes) -> Iterator[bytes]:
        begun.set()
        for piece in slowly(data):
            sent.append(len(piece))
            yield piece

    def fail_one(server: str, method: str, path: str) -> None:
        if method == "HEAD" and "00001" in path:
            begun.wait(10)
            raise ConnectionError

    export(plan, tmp_path / "out", dry_run=True)
    hub.pieces, hub.before = pieces, fail_one
    with pytest.raises(ExportError, match=r"^model-00001-of-00006.safetensors: "):
        export(plan, tmp_path / "out", keep_source=False, jobs=2)
    assert 0 < sum(sent) < 1_000_000, "of 3 MB"


def test_a_source_that_two_read_stays_until_both_are_done(hub, large, plan, tmp_path):
    """A finished shard that turns out damaged is written again, and was not counted among those that read."""
    name = "model-00002-of-00006.safetensors"
    located = locate(NAME)
    shard = replace(prepared(plan, tmp_path / "out").shards[1], name="one")
    assert [file.name for file in shard.files] == [name]
    sources = HubSources(located, shards=[shard], folder=tmp_path / "downloads")
    with sources.open(located.folder / name) as path:
        with sources.open(located.folder / name) as again:
            assert again == path
        assert path.read_bytes() == (large / name).read_bytes()
    assert not path.exists()


# Without a connection, and from the command line


def test_a_cached_model_is_exported_without_a_connection(hub, large, plan, expected, tmp_path, monkeypatch):
    snapshot_download(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    export(plan, tmp_path / "out")
    assert weights(tmp_path / "out") == expected
    assert hub.requests == []


def test_the_command_line_exports_from_an_endpoint_in_the_environment(hub, large, plan, expected, tmp_path):
    plan.save(tmp_path / "plan.json")
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = ["export", NAME, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out", "--no-keep-source"]
    done = subprocess.run(
        [sys.executable, "-m", "moeprune", *map(str, command)],
        env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "out") == expected
