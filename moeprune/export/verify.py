"""Verify a pruned checkpoint against its source, by other means than those that wrote it.

The exporter moves byte ranges by its own arithmetic; here every tensor is read through the safetensors library, and the
logits come from two models that transformers loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from moeprune.anatomy.roles import AllExperts, ExpertIds, OneExpert, Towers
from moeprune.anatomy.source import Source, open_source
from moeprune.checkpoint.folder import Checkpoint, open_checkpoint, resolve_model
from moeprune.checkpoint.load import load_model
from moeprune.errors import CheckpointError, UnsupportedModelError, VerifyError
from moeprune.export.behaviour import RELOAD, check_streamed, check_whole, no_room, probes, run_whole
from moeprune.export.copying import HASH, hash_file
from moeprune.export.export import MANIFEST
from moeprune.files import read_json
from moeprune.plan.plan import Plan
from moeprune.resources import DEMO
from moeprune.verified import Check

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def verify_checkpoint(
    folder: Path,
    *,
    against: str | Path | None = None,
    plan: Plan | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> list[Check]:
    """Run all checks; later ones are left out where an earlier one failed.

    Args:
        folder: The pruned checkpoint.
        against: The source; by default what ``moeprune.json`` names, where it is still there.
        plan: The plan; by default the one in ``moeprune.json``.
        device: Where the models run.
        quiet: No progress bar.

    Returns:
        The checks in order. Without a source the files are compared with the hashes that the export recorded, bytes and
        logits are not compared, and the list says so.
    """
    try:
        plan = plan or _recorded_plan(folder)
        plan.check()
        checkpoint = open_checkpoint(folder)
        source_path = _source_path(plan, against)
        source = open_source(source_path) if source_path else None
    except CheckpointError as error:
        return [Check("files", False, str(error))]
    checks = []
    result: Source | None = None
    pruned: PreTrainedModel | None = None
    why: str | None = None
    try:
        result = open_source(folder)
        checks.append(Check("layout", True, "every tensor that the config asks for is stored"))
        checks.append(_check_counts(result, plan))
        if result.why_not_run:
            checks.append(Check(RELOAD, True, f"not made, nor are logits compared: {result.why_not_run}"))
        elif (why := no_room(result, source, device=device)) is None:
            pruned = load_model(folder, device=device)
            checks.append(Check(RELOAD, True, "no missing, unexpected or mismatched tensor"))
    except (CheckpointError, UnsupportedModelError) as error:
        checks.append(_not_loaded(error, source, device) if checks else Check("layout", False, str(error)))
    if source is None:
        checks += _check_hashes(checkpoint, quiet)
        checks.append(
            Check("comparison with the source", True, f"not made: {plan.model.name} is not at hand (--against)")
        )
    else:
        checks.append(_check_fingerprint(source, plan))
        if (source.facts.layers, source.facts.num_experts) == (plan.model.layers, plan.model.num_experts):
            checks.append(_check_tensors(checkpoint, source, plan, quiet))
    if result is None or not all(check.passed for check in checks):
        return checks
    if pruned is not None:
        outputs = run_whole(pruned, probes(result))
        del pruned  # there may be room for one model
        checks += check_whole(outputs, source, plan=plan, device=device)
    elif why is not None:
        checks += check_streamed(result, source, plan=plan, device=device, why=why)
    return checks


def _recorded_plan(folder: Path) -> Plan:
    if not folder.is_dir():
        raise VerifyError(f"{folder}: no such folder. Give a checkpoint that `moeprune export` wrote.")
    file = folder / MANIFEST
    if not file.is_file():
        raise VerifyError(f"{folder}: no {MANIFEST}. Give the plan with --plan.")
    try:
        return Plan.model_validate(read_json(file)["plan"])
    except (ValueError, KeyError, TypeError) as error:
        raise VerifyError(
            f"{file}: not a manifest that this version of moeprune reads. Give the plan with --plan."
        ) from error


def _source_path(plan: Plan, against: str | Path | None) -> Path | None:
    if against is not None:
        return resolve_model(against)
    recorded = plan.model.name
    return resolve_model(recorded) if recorded == DEMO or Path(recorded).is_dir() else None


def _not_loaded(error: Exception, source: Source | None, device: str) -> Check:
    """A reload that failed; not for the export to answer for if the source fails as well."""
    if source is not None:
        try:
            load_model(source.path, device=device)
        except CheckpointError as same:
            return Check(RELOAD, True, f"not made, nor are logits compared, as for the source: {same}")
    return Check(RELOAD, False, str(error))


def _check_counts(pruned: Source, plan: Plan) -> Check:
    name, anatomy, config = "config", pruned.anatomy, pruned.checkpoint.config
    for field, before, expected in (
        (anatomy.num_experts, plan.model.num_experts, plan.num_experts),
        (anatomy.top_k, plan.model.top_k, plan.top_k),
    ):
        raw = field.within(config)
        for alias in field.names_in(config, before):
            if raw.get(alias) != expected:
                return Check(name, False, f"{alias} is {raw.get(alias)}, the plan says {expected}")
    return Check(name, True, f"{plan.num_experts} experts, top-{plan.top_k}, under every name that readers look for")


def _check_fingerprint(source: Source, plan: Plan) -> Check:
    found = source.checkpoint.fingerprint()
    same = found == plan.model.fingerprint
    detail = f"{source.checkpoint.path} ({found[:12]})"
    return Check("source", same, detail if same else f"{detail}: the plan was made for {plan.model.fingerprint[:12]}")


def _check_hashes(checkpoint: Checkpoint, quiet: bool) -> list[Check]:
    """Whether the files are those that were written; no check where the export left no record."""
    manifest = checkpoint.path / MANIFEST
    recorded = read_json(manifest).get("files") if manifest.is_file() else None
    if not recorded or not isinstance(recorded, dict):
        return []
    name, found = "files as they were written", {shard.name: shard for shard in checkpoint.shards}
    if found.keys() != recorded.keys():
        other = min(found.keys() ^ recorded.keys())
        return [Check(name, False, f"{other} is {'not in' if other in found else 'only in'} {MANIFEST}")]
    total = sum(shard.stat().st_size for shard in checkpoint.shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=quiet) as bar:
        for shard in checkpoint.shards:
            if hash_file(shard, progress=bar.update) != recorded[shard.name].get(HASH):
                return [Check(name, False, f"{shard.name} has another {HASH} hash than {MANIFEST} says")]
    return [Check(name, True, f"{len(found)} files, {total:,} bytes, by their {HASH} hashes")]


def _check_tensors(checkpoint: Checkpoint, source: Source, plan: Plan, quiet: bool) -> Check:
    name = "every tensor byte for byte"
    compared: set[str] = set()
    with (
        ExitStack() as stack,
        tqdm(total=checkpoint.num_bytes, unit="B", unit_scale=True, desc=name, disable=quiet) as bar,
    ):
        read = _reader(stack)
        for key, expected_key, cut in _expected(source, plan):
            info = checkpoint.tensors.get(expected_key)
            if info is None:
                return Check(name, False, f"{expected_key!r} is missing")
            original = source.checkpoint.tensors[key]
            if not _same_bytes(cut(read(original.file, key)), read(info.file, expected_key)):
                return Check(name, False, f"{expected_key!r} differs from {key!r} of the source")
            compared.add(expected_key)
            bar.update(info.num_bytes)
    extra = checkpoint.tensors.keys() - compared
    if extra:
        return Check(name, False, f"{len(extra)} tensors that the source does not explain, first {min(extra)!r}")
    return Check(name, True, f"{len(compared)} tensors, {checkpoint.num_bytes:,} bytes")


def _expected(source: Source, plan: Plan) -> Iterator[tuple[str, str, Callable[[Tensor], Tensor]]]:
    """(source key, key in the pruned checkpoint, what is done to the tensor) for all that must be there."""
    import torch

    keep, before, after = plan.keep, plan.model.num_experts, plan.num_experts
    for key in source.checkpoint.tensors:
        role = source.roles.get(key)
        if key in source.mtp and plan.mtp == "drop":
            continue
        if isinstance(role, OneExpert):
            # Behind the experts there may be entries that are none, and that stay.
            order = [*keep[role.layer], *range(before, role.expert + 1)]
            if role.expert in order:
                yield key, role.renumbered(key, order.index(role.expert) + role.tower * after), lambda tensor: tensor
        elif isinstance(role, AllExperts):
            rows = [i * role.rows + row for i in keep[role.layer] for row in range(role.rows)]
            index = torch.tensor(rows + [before * role.rows + row for row in range(role.extra)])
            yield key, key, lambda tensor, dim=role.dim, index=index: tensor.index_select(dim, index)
        elif isinstance(role, Towers):
            yield key, key, lambda tensor, role=role: _towers(tensor, role, keep)
        elif isinstance(role, ExpertIds):
            yield key, key, lambda tensor, ids=keep[role.layer]: _renamed_ids(tensor, ids, plan.top_k)
        else:
            yield key, key, lambda tensor: tensor


def _towers(tensor: Tensor, role: Towers, keep: Mapping[str, Sequence[int]]) -> Tensor:
    import torch

    parts = zip(tensor.split(1), role.layers, strict=True)
    return torch.cat([part.index_select(role.dim, torch.tensor(keep[layer])) for part, layer in parts])


def _renamed_ids(table: Tensor, keep: Sequence[int], top_k: int) -> Tensor:
    import torch

    new = {expert: number for number, expert in enumerate(keep)}
    rows = []
    for token, ids in enumerate(table.tolist()):
        row = [new[expert] for expert in ids if expert in new]
        turn = [(token + step) % len(keep) for step in range(len(keep))]
        rows.append((row + [number for number in turn if number not in row])[:top_k])
    return torch.tensor(rows, dtype=table.dtype)


def _reader(stack: ExitStack) -> Callable[[Path, str], Tensor]:
    from safetensors import safe_open

    opened: dict[Path, Any] = {}

    def read(file: Path, key: str) -> Tensor:
        if file not in opened:
            opened[file] = stack.enter_context(safe_open(file, framework="pt"))
        return opened[file].get_tensor(key)

    return read


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes: a NaN equals itself, and 0.0 does not equal -0.0.
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
