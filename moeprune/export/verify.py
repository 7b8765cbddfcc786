"""Verify a pruned checkpoint against its source, by other means than those that wrote it.

The exporter moves byte ranges by its own arithmetic; here every tensor is read through the safetensors library, and the
logits come from two models that transformers loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from moeprune.anatomy.roles import AllExperts, ExpertIds, OneExpert, Towers
from moeprune.anatomy.source import Source, open_source
from moeprune.calibrate.streaming.memory import fits
from moeprune.checkpoint.folder import Checkpoint, open_checkpoint, resolve_model
from moeprune.checkpoint.load import load_model
from moeprune.errors import CheckpointError, UnsupportedModelError, VerifyError
from moeprune.export.export import MANIFEST
from moeprune.files import read_json
from moeprune.plan.plan import Plan
from moeprune.resources import DEMO
from moeprune.verified import Check

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROBE_LENGTHS = (48, 17)
NEW_TOKENS = 8


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
        The checks in order. Without a source, bytes and logits are not compared, and the list says so.
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
    pruned: PreTrainedModel | None = None
    try:
        result = open_source(folder)
        checks.append(Check("layout", True, "every tensor that the config asks for is stored"))
        checks.append(_check_counts(result, plan))
        if why := _why_not_run(result, source, device):
            checks.append(Check("strict reload", True, f"not made, nor are logits compared: {why}"))
        else:
            pruned = load_model(folder, device=device)
            checks.append(Check("strict reload", True, "no missing, unexpected or mismatched tensor"))
    except (CheckpointError, UnsupportedModelError) as error:
        checks.append(Check("strict reload" if checks else "layout", False, str(error)))
    if source is None:
        checks.append(
            Check("comparison with the source", True, f"not made: {plan.model.name} is not at hand (--against)")
        )
    else:
        checks.append(_check_fingerprint(source, plan))
        if (source.facts.layers, source.facts.num_experts) == (plan.model.layers, plan.model.num_experts):
            checks.append(_check_tensors(checkpoint, source, plan, quiet))
    if pruned is not None and all(check.passed for check in checks):
        outputs = _run(pruned)
        del pruned  # there may be room for one model
        checks += _check_outputs(outputs, source, plan, device)
    return checks


def _recorded_plan(folder: Path) -> Plan:
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


def _why_not_run(pruned: Source, source: Source | None, device: str) -> str | None:
    if pruned.why_not_run:
        return pruned.why_not_run
    for model in (source or pruned, pruned):  # one after the other; the source is the larger one
        room, why = fits(model, device=device)
        if not room:
            return why
    return None


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


@dataclass(frozen=True)
class _Outputs:
    """What the pruned model says to random tokens: ``probes`` (rows, tokens), their logits, and tokens written."""

    probes: list[Tensor]
    logits: list[Tensor]
    written: int


def _run(pruned: PreTrainedModel) -> _Outputs:
    import torch

    generator = torch.Generator().manual_seed(0)
    embedding: Any = pruned.get_input_embeddings()
    vocab = int(embedding.weight.shape[0])
    probes = [torch.randint(vocab, (2, length), generator=generator).to(pruned.device) for length in PROBE_LENGTHS]
    generate: Any = pruned.generate
    text = generate(probes[0][:1, :8], max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return _Outputs(probes, [_logits(pruned, ids) for ids in probes], text.shape[1] - 8)


def _check_outputs(outputs: _Outputs, source: Source | None, plan: Plan, device: str) -> list[Check]:
    from moeprune.apply.memory import apply_plan

    checks = []
    if not all(bool(logits.isfinite().all()) for logits in outputs.logits):
        checks.append(Check("finite logits", False, "the pruned model gives NaN or infinity"))
    if source is not None:
        original = load_model(source.checkpoint.path, device=device)
        in_memory = apply_plan(original, plan=plan, anatomy=source.anatomy)
        worst = max(
            float((_logits(in_memory, ids).float() - logits.float()).abs().max())
            for ids, logits in zip(outputs.probes, outputs.logits, strict=True)
        )
        detail = f"largest difference {worst:g} over {sum(ids.numel() for ids in outputs.probes)} tokens"
        checks.append(Check("logits equal to the plan applied in memory", worst == 0, detail))
    checks.append(Check("generation", outputs.written > 0, f"{outputs.written} tokens"))
    return checks


def _logits(model: Any, ids: Tensor) -> Tensor:
    import torch

    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits
