"""Exports that are killed for good, and what the next one makes of what they left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from moeprune.errors import ExportError
from moeprune.export.export import export_checkpoint
from moeprune.export.journal import JOURNAL
from moeprune.export.verify import verify_checkpoint
from moeprune.files import locked
from moeprune.interrupts import Interrupted
from moeprune.plan.plan import Plan
from tests.models import save
from tests.pruning import all_bytes, edit_config, plan_for

KILLED_AFTER = """
import os, signal, sys
from pathlib import Path
from moeprune.export.export import export_checkpoint as export
from moeprune.plan.plan import Plan
left, real = int(sys.argv[4]), os.pwrite
def pwrite(fd, data, offset):
    global left
    left -= 1
    if left < 0:
        real(fd, bytes(data)[: len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(fd, data, offset)
os.pwrite = pwrite
export(sys.argv[1], plan=Plan.load(Path(sys.argv[2])), out=Path(sys.argv[3]), jobs=int(sys.argv[5]), quiet=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save("mixtral", tmp_path_factory.mktemp("resume") / "source", shard="30KB")


@pytest.fixture(scope="module")
def plan(source) -> Plan:
    return plan_for(source, "mixtral")


@pytest.fixture(scope="module")
def unbroken(source, plan, tmp_path_factory) -> dict[str, bytes]:
    """The files of an export that nobody killed."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    export_checkpoint(source, plan=plan, out=out, quiet=True)
    return all_bytes(out)


def export(source: Path, plan: Plan, out: Path, **options) -> None:
    export_checkpoint(source, plan=plan, out=out, quiet=True, **options)


def kill(source: Path, plan: Plan, out: Path, *, after: int, jobs: int = 1) -> Path:
    """Export in a process that kills itself in the middle of its n-th write; return the folder it leaves."""
    plan.save(out.with_name("plan.json"))
    command = [sys.executable, "-c", KILLED_AFTER, source, out.with_name("plan.json"), out, after, jobs]
    assert subprocess.run([str(part) for part in command], check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    return out.with_name(f"{out.name}.partial")


@pytest.fixture(scope="module")
def killed(source, plan, tmp_path_factory) -> Path:
    """What an export leaves that was killed in its third or fourth shard."""
    return kill(source, plan, tmp_path_factory.mktemp("killed") / "out", after=10)


@pytest.fixture
def out(killed, tmp_path) -> Path:
    """A folder to export to, beside a copy of what the killed export left."""
    shutil.copytree(killed, tmp_path / "out.partial")
    return tmp_path / "out"


def entered(partial: Path) -> dict[str, dict[str, object]]:
    return json.loads((partial / JOURNAL).read_text())["shards"]


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_killed_export_goes_on_and_ends_with_the_same_bytes(tmp_path, source, plan, unbroken, jobs):
    out = tmp_path / "out"
    partial = kill(source, plan, out, after=10, jobs=jobs)
    finished = {name: identity(partial / name) for name in entered(partial)}
    assert 0 < len(finished) < sum(name.endswith(".safetensors") for name in unbroken)
    assert {path.name for path in partial.glob("*.safetensors")} > finished.keys(), "one was being written"
    summary = export_checkpoint(source, plan=plan, out=out, quiet=True, dry_run=True)
    assert summary.finished == tuple(sorted(finished))
    export(source, plan, out, jobs=jobs)
    assert {name: identity(out / name) for name in finished} == finished, "finished shards are not written again"
    after = all_bytes(out)
    assert after.keys() == unbroken.keys()
    # The card names the folder, which is the same; nothing in it tells that there was a break.
    assert after == unbroken
    assert not partial.exists()
    assert all(check.passed for check in verify_checkpoint(out, quiet=True))


def test_an_export_may_be_killed_again_and_again(tmp_path, source, plan, unbroken):
    out, done = tmp_path / "out", 0
    for _ in range(2):
        partial = kill(source, plan, out, after=4)
        assert len(entered(partial)) > done
        done = len(entered(partial))
    export(source, plan, out)
    assert all_bytes(out) == unbroken


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_asked_to_stop_says_how_to_go_on(tmp_path, source, plan, unbroken, signum, monkeypatch):
    out, real, left = tmp_path / "out", os.pwrite, 10

    def pwrite(fd, data, offset):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signum)
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(Interrupted) as stop:
            export(source, plan, out, jobs=1)
    assert str(stop.value) == f"stopped by {signum.name}. Finished files are kept; run the same command again."
    assert not out.exists()
    assert entered(tmp_path / "out.partial")
    export(source, plan, out)
    assert all_bytes(out) == unbroken


def test_the_journal_and_the_manifest_hold_the_hash_of_each_file(tmp_path, out, source, plan):
    for name, entry in entered(tmp_path / "out.partial").items():
        data = (tmp_path / "out.partial" / name).read_bytes()
        assert entry == {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    export(source, plan, out)
    manifest = json.loads((out / "moeprune.json").read_text())
    assert manifest["files"] == {
        path.name: {"bytes": path.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes())}
        for path in sorted(out.glob("*.safetensors"))
    }


@pytest.mark.parametrize("damage", ["flipped", "cut", "deleted"])
def test_a_finished_shard_that_was_damaged_since_is_written_again(tmp_path, out, source, plan, unbroken, damage):
    partial = tmp_path / "out.partial"
    victim = partial / sorted(entered(partial))[0]
    data = bytearray(victim.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
        victim.write_bytes(data)
    elif damage == "cut":
        os.truncate(victim, len(data) - 1)
    else:
        victim.unlink()
    export(source, plan, out)
    assert all_bytes(out) == unbroken


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "job": "x", "shards": 3}'])
def test_a_journal_that_was_torn_by_a_power_cut_is_started_again(tmp_path, out, source, plan, unbroken, text):
    (tmp_path / "out.partial" / JOURNAL).write_text(text)
    export(source, plan, out)
    assert all_bytes(out) == unbroken


def test_leftovers_of_another_plan_are_not_mixed_in(tmp_path, out, source, plan):
    other, partial = plan_for(source, "mixtral", seed=1), tmp_path / "out.partial"
    assert other.keep != plan.keep
    finished = {name: identity(partial / name) for name in entered(partial)}
    export(source, other, out)
    assert not finished.items() & {name: identity(out / name) for name in finished}.items()
    assert all(check.passed for check in verify_checkpoint(out, plan=other, quiet=True))


@pytest.mark.parametrize("dry_run", [False, True])
def test_leftovers_that_are_of_no_use_are_counted(tmp_path, out, source, plan, dry_run):
    left = sum(path.stat().st_size for path in (tmp_path / "out.partial").glob("*.safetensors"))
    options = {"out": out, "quiet": True, "dry_run": dry_run}
    assert export_checkpoint(source, plan=plan_for(source, "mixtral", seed=1), **options).discarded == left > 0
    assert export_checkpoint(source, plan=plan, **options, force=True).discarded == 0


def test_leftovers_of_other_options_are_not_mixed_in(out, source, plan):
    export(source, plan, out, max_shard_size="20KB")
    assert all(check.passed for check in verify_checkpoint(out, quiet=True))


def test_a_source_that_changed_between_two_attempts_is_read_again(tmp_path):
    """The fingerprint samples both ends of a shard; a change in the middle shows in the file's time only."""
    source = save("mixtral", tmp_path / "source", shard="30KB")
    plan, out = plan_for(source, "mixtral"), tmp_path / "out"
    partial = kill(source, plan, out, after=10)
    assert entered(partial)
    shard = sorted(source.glob("*.safetensors"))[-1]
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert export_checkpoint(source, plan=plan, out=out, quiet=True, dry_run=True).finished == ()


def test_another_source_with_the_same_tensors_is_not_taken_for_this_one(tmp_path, out):
    changed = save("mixtral", tmp_path / "changed", shard="30KB")
    edit_config(changed, remark="another config, the same weights")
    assert (
        export_checkpoint(changed, plan=plan_for(changed, "mixtral"), out=out, quiet=True, dry_run=True).finished == ()
    )


def test_a_dry_run_leaves_what_a_killed_export_left(tmp_path, out, source, plan):
    before = all_bytes(tmp_path / "out.partial")
    assert export_checkpoint(source, plan=plan, out=out, quiet=True, dry_run=True).finished
    assert all_bytes(tmp_path / "out.partial") == before


def test_two_exports_into_one_folder(tmp_path, source, plan):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()
    (partial / "half.safetensors").write_bytes(b"of the other")
    (partial / JOURNAL).write_text("{}")
    with locked(partial), pytest.raises(ExportError) as error:
        export(source, plan, out)
    assert str(error.value) == f"{partial}: another export writes there. Wait for it, or choose another --out."
    assert (partial / "half.safetensors").read_bytes() == b"of the other"
    export(source, plan, out)


def test_an_error_in_one_shard_stops_the_others_and_the_next_attempt_goes_on(
    tmp_path, source, plan, unbroken, monkeypatch
):
    out, real, calls = tmp_path / "out", os.pwrite, []

    def full(fd, data, offset):
        calls.append(offset)
        if len(calls) == 12:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ExportError) as error:
            export(source, plan, out, jobs=2)
    assert str(error.value) == (
        f"{tmp_path / 'out.partial'}: No space left on device. Finished shards are kept; run the same command again."
    )
    assert not out.exists()
    assert entered(tmp_path / "out.partial")
    export(source, plan, out)
    assert all_bytes(out) == unbroken
