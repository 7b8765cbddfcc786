"""Where an export may write: nothing of another's is deleted, and what the system refuses is an error for people."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from moeprune.errors import ExportError
from moeprune.export import export as export_module
from moeprune.export.export import export_checkpoint
from moeprune.export.journal import JOURNAL
from moeprune.plan.plan import LayerPlan, Plan
from tests.models import save
from tests.pruning import all_bytes, plan_for


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save("mixtral", tmp_path_factory.mktemp("target") / "source", shard="30KB")


@pytest.fixture(scope="module")
def plan(source) -> Plan:
    return plan_for(source, "mixtral")


def refusal(source: Path, plan: Plan, out: Path, **options) -> str:
    with pytest.raises(ExportError) as error:
        export_checkpoint(source, plan=plan, out=out, quiet=True, **options)
    return str(error.value)


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_something_of_the_users_where_an_export_works_is_not_deleted(tmp_path, source, plan, name, kind, dry_run):
    out, precious = tmp_path / "out", tmp_path / name
    export_checkpoint(source, plan=plan, out=out, quiet=True)
    if kind == "folder":
        precious.mkdir()
        (precious / "thesis.tex").write_text("years of work")
    elif kind == "file":
        precious.write_text("years of work")
    else:
        (tmp_path / "elsewhere").mkdir()
        precious.symlink_to("elsewhere")
    before = all_bytes(tmp_path)
    assert refusal(source, plan, out, force=True, dry_run=dry_run) == (
        f"{precious}: an export to {out} works there, and this is something else. Rename or delete it."
    )
    assert all_bytes(tmp_path) == before


def test_a_folder_with_a_copy_of_a_manifest_is_not_taken_for_an_export(tmp_path, source, plan):
    out = tmp_path / "notes"
    out.mkdir()
    (out / "old-moeprune.json").write_text("{}")
    assert "--force replaces only checkpoints that moeprune wrote" in refusal(source, plan, out, force=True)
    assert (out / "old-moeprune.json").is_file()


@pytest.mark.parametrize("left", [(), (JOURNAL,), (f".{JOURNAL}.123.tmp",), (JOURNAL, "model.safetensors")])
def test_what_a_killed_export_left_at_any_moment_is_no_obstacle(tmp_path, source, plan, left):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    for name in left:
        (partial / name).write_text("")
    export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("after", ["first rename", "second rename", "half of the deletion"])
def test_an_export_killed_while_it_replaces_another_is_finished_by_the_next(tmp_path, source, plan, after, monkeypatch):
    out, rename, left = tmp_path / "out", Path.rename, {"first rename": 1, "second rename": 2}.get(after, 9)
    export_checkpoint(source, plan=plan, out=out, quiet=True)
    unbroken = all_bytes(out)

    def dying_rename(self, target):
        nonlocal left
        rename(self, target)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    def dying_rmtree(path, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying_rename)
        if after == "half of the deletion":
            patch.setattr("moeprune.export.target.shutil.rmtree", dying_rmtree)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(source, plan=plan, out=out, quiet=True, force=True)
    export_checkpoint(source, plan=plan, out=out, quiet=True, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert all_bytes(out) == unbroken


@pytest.mark.parametrize("exists", [False, True])
def test_a_target_that_is_a_link_is_made_where_it_leads(tmp_path, source, plan, exists):
    real, out = tmp_path / "disk" / "real", tmp_path / "out"
    real.parent.mkdir()
    if exists:
        real.mkdir()
    out.symlink_to(real)
    export_checkpoint(source, plan=plan, out=out, quiet=True, force=exists)
    assert out.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}
    assert {path.name for path in real.parent.iterdir()} == {"real"}
    assert (real / "config.json").is_file()


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_target_below_a_file(tmp_path, source, plan, dry_run):
    (tmp_path / "notes").write_text("text")
    out = tmp_path / "notes" / "out"
    assert refusal(source, plan, out, dry_run=dry_run) == (
        f"{out}: cannot be made, since {tmp_path / 'notes'} is no folder that may be written to. Choose another."
    )


def test_a_target_in_a_folder_that_may_not_be_written_to(tmp_path, source, plan, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root, every folder may be
    out = tmp_path / "new" / "out"
    assert refusal(source, plan, out) == (
        f"{out}: cannot be made, since {tmp_path} is no folder that may be written to. Choose another."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_tokenizer_that_may_not_be_read_is_refused_before_the_weights_are_copied(
    tmp_path, source, plan, monkeypatch, dry_run
):
    copy, access = shutil.copytree(source, tmp_path / "source"), os.access
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tokenizer and access(path, mode))
    assert refusal(copy, plan, tmp_path / "out", dry_run=dry_run) == (
        f"{tokenizer}: may not be read. Change its permissions, or take it away."
    )
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("out", [".", "..", "", "../cwd"])
def test_the_current_folder_is_not_replaced(tmp_path, source, plan, monkeypatch, out):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert refusal(source, plan, Path(out), force=True) == (
        f"{Path(out)}: is the current folder or around it. Choose another folder."
    )


def test_a_name_that_the_file_system_does_not_take(tmp_path, source, plan):
    assert refusal(source, plan, tmp_path / ("n" * 250)).endswith(".partial: File name too long.")


@pytest.mark.parametrize("step", ["copy_other_files", "write_card", "write_json", "put_in_place"])
def test_a_disk_that_fails_after_the_weights_is_an_error_for_people_and_the_next_attempt_goes_on(
    tmp_path, source, plan, monkeypatch, step
):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "full"))

    with monkeypatch.context() as patch:
        patch.setattr(export_module, step, full)
        assert refusal(source, plan, tmp_path / "out") == f"{tmp_path / 'full'}: No space left on device."
    finished = json.loads((tmp_path / "out.partial" / JOURNAL).read_text())["shards"]
    summary = export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    assert summary.finished == tuple(sorted(finished)) == tuple(sorted(summary.files))


def test_links_need_no_room(tmp_path, source, plan, monkeypatch):
    """Another top-k of a model that fills half of the disk."""
    everything = range(plan.model.num_experts)
    lower = Plan(
        model=plan.model,
        num_experts=len(everything),
        top_k=1,
        layers=tuple(LayerPlan(layer=name, keep=tuple(everything)) for name in plan.model.layers),
    )
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 0))
    assert "only 0 B are free" in refusal(source, lower, tmp_path / "out")
    assert "only 0 B are free" in refusal(source, plan, tmp_path / "out", link=True), "files change"
    export_checkpoint(source, plan=lower, out=tmp_path / "out", quiet=True, link=True)
    assert all(path.samefile(source / path.name) for path in (tmp_path / "out").glob("*.safetensors"))


def test_files_linked_by_a_killed_export_are_copied_by_one_that_is_not_to_link(tmp_path, monkeypatch, source, plan):
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "copy_other_files", die)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(source, plan=plan, out=out, quiet=True, link=True)
    assert any(path.stat().st_nlink > 1 for path in (tmp_path / "out.partial").glob("*.safetensors"))
    export_checkpoint(source, plan=plan, out=out, quiet=True)
    assert all(path.stat().st_nlink == 1 for path in out.glob("*.safetensors"))
