"""Verify a pruned GGUF file against its source, by other means than those that wrote it.

Both files are read by the gguf package's own reader; which experts an axis should keep is indexing by numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError
from tqdm import tqdm

from moeprune.errors import MoePruneError, VerifyError
from moeprune.gguf.file import SPLIT_KEYS, GgufFile, open_gguf
from moeprune.gguf.match import match_plan
from moeprune.gguf.metadata import OURS, PLAN_KEY, recorded_plan
from moeprune.gguf.model import GgufModel, read_model
from moeprune.gguf.roles import Single
from moeprune.plan.plan import Plan
from moeprune.verified import Check

if TYPE_CHECKING:
    from gguf import GGUFReader


def verify_gguf(
    path: str | Path, *, against: str | Path | None, plan: Plan | None = None, quiet: bool = False
) -> list[Check]:
    """Run all checks; later ones are left out where an earlier one failed.

    Args:
        path: The pruned file.
        against: Its source.
        plan: The plan; by default the one that the file carries.
        quiet: No progress bar.

    Raises:
        VerifyError: If the plan or the source is not at hand.
        CheckpointError: If the source is incomplete or damaged.
    """
    try:
        pruned = read_model(open_gguf(path))
    except MoePruneError as error:
        return [Check("file", False, str(error))]
    plan = plan or _recorded_plan(pruned.file)
    if against is None:
        raise VerifyError(f"{path}: give the GGUF file it was made from with --against; its path is not recorded.")
    source = read_model(open_gguf(against))
    checks = [Check("file", True, f"{pruned.architecture}, {len(pruned.file.tensors)} tensors"), _counts(pruned, plan)]
    from gguf import GGUFReader

    sources, result = [GGUFReader(file) for file in source.file.files], GGUFReader(pruned.file.path)
    checks.append(_metadata(sources[0], result, source.architecture))
    if all(check.passed for check in checks):
        checks.append(_tensors(source, plan, sources, result, quiet=quiet))
    return checks


def _recorded_plan(file: GgufFile) -> Plan:
    text = recorded_plan(file.metadata)
    if text is None:
        raise VerifyError(f"{file.path}: carries no {PLAN_KEY}. Give the plan with --plan.")
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise VerifyError(f"{file.path}: its {PLAN_KEY} is not one that this version of moeprune reads.") from error


def _counts(pruned: GgufModel, plan: Plan) -> Check:
    routing = plan.model.routing
    n_group, topk_group = (1, 1) if plan.n_group is not None else (routing.n_group, routing.topk_group)
    fits = (
        pruned.num_experts == plan.num_experts
        and pruned.top_k == (plan.top_k,)
        and pruned.n_group in (None, 0, n_group)  # None and 0: a file that has no groups
        and (pruned.topk_group in (None, 0, topk_group) or routing.n_group == 1)
    )
    detail = _count_text(pruned.num_experts, pruned.top_k, pruned.topk_group or 1, pruned.n_group or 1)
    expected = _count_text(plan.num_experts, (plan.top_k,), topk_group, n_group)
    return Check("counts", fits, detail if fits else f"{detail}; the plan says {expected}")


def _count_text(num_experts: int, top_k: tuple[int, ...], topk_group: int, n_group: int) -> str:
    groups = f"{topk_group} of {n_group} groups" if n_group > 1 else "1 group"
    return f"{num_experts} experts, top-{' or '.join(map(str, top_k))}, {groups}"


def _metadata(source: GGUFReader, result: GGUFReader, architecture: str) -> Check:
    counts = ("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count")
    changed = {*(f"{architecture}.{name}" for name in counts), *SPLIT_KEYS}

    def entries(reader: GGUFReader) -> dict[str, bytes]:
        return {
            name: b"".join(part.tobytes() for part in field.parts)
            for name, field in reader.fields.items()
            if name not in changed and not name.startswith((OURS, "GGUF."))
        }

    before, after = entries(source), entries(result)
    different = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    name = "all other metadata byte for byte"
    if different:
        return Check(name, False, f"{len(different)} entries differ, first {different[0]!r}")
    return Check(name, True, f"{len(before)} entries")


def _tensors(source: GgufModel, plan: Plan, sources: list[GGUFReader], result: GGUFReader, *, quiet: bool) -> Check:
    name = "every tensor byte for byte"
    originals = {tensor.name: tensor for reader in sources for tensor in reader.tensors}
    written = {tensor.name: tensor for tensor in result.tensors}
    compared: set[str] = set()
    total = sum(tensor.n_bytes for tensor in result.tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=quiet) as bar:
        for key, new_key, ids, axis in _expected(source, match_plan(source, plan)):
            old, new = originals[key], written.get(new_key)
            if new is None:
                return Check(name, False, f"{new_key!r} is missing")
            if old.tensor_type != new.tensor_type or not _same(old.data, new.data, ids, axis):
                return Check(name, False, f"{new_key!r} differs from {key!r} of the source")
            compared.add(new_key)
            bar.update(new.n_bytes)
    extra = written.keys() - compared
    if extra:
        return Check(name, False, f"{len(extra)} tensors that the source does not explain, first {min(extra)!r}")
    return Check(name, True, f"{len(compared)} tensors, {total:,} bytes")


def _expected(
    source: GgufModel, keep: Mapping[int, tuple[int, ...]]
) -> Iterator[tuple[str, str, tuple[int, ...] | None, int]]:
    """(source's name, pruned file's name, kept ids or None, numpy's axis of the experts) for all that must be there."""
    for name, tensor in source.file.tensors.items():
        role = source.roles.get(name)
        if role is None:
            yield name, name, None, 0
        elif not isinstance(role, Single):
            yield name, name, keep[role.block], len(tensor.ne) - 1 - role.axis
        elif role.expert in keep[role.block]:
            yield name, role.renamed(keep[role.block].index(role.expert)), None, 0


def _same(old: np.ndarray[Any, Any], new: np.ndarray[Any, Any], ids: tuple[int, ...] | None, axis: int) -> bool:
    if ids is None:
        return old.shape == new.shape and old.tobytes() == new.tobytes()
    if new.shape != (*old.shape[:axis], len(ids), *old.shape[axis + 1 :]):
        return False
    experts, kept = np.moveaxis(old, axis, 0), np.moveaxis(new, axis, 0)
    return all(experts[before].tobytes() == kept[after].tobytes() for after, before in enumerate(ids))
