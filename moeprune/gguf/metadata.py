"""The metadata of a pruned GGUF file: counts changed, a note on its origin added, all else as bytes."""

from __future__ import annotations

import struct

from moeprune import __version__
from moeprune.gguf.file import SPLIT_KEYS
from moeprune.gguf.header import ARRAY, SCALARS, STRING, KeyValue
from moeprune.gguf.model import GgufModel
from moeprune.plan.plan import Plan

OURS = "moeprune."
PLAN_KEY = f"{OURS}plan"
EARLIER = f"{OURS}earlier."

Entry = bytes | KeyValue


def pruned_metadata(model: GgufModel, plan: Plan) -> list[Entry]:
    """Entries of the pruned file: those to copy from the source, and new ones ready to write.

    ``split.*`` is left out, as the result is one file. Entries that an earlier pruning left are renamed, so that the
    whole history can be read.

    Args:
        model: The source.
        plan: What is done to it.
    """
    changed = {
        f"{model.architecture}.expert_count": plan.num_experts,
        f"{model.architecture}.expert_used_count": plan.top_k,
    }
    if plan.n_group is not None:  # the way to switch groups off; fewer groups used than there are would be refused
        changed |= {f"{model.architecture}.expert_group_count": 1, f"{model.architecture}.expert_group_used_count": 1}
    entries: list[Entry] = []
    for key, entry in model.file.metadata.items():
        if key in SPLIT_KEYS:
            continue
        if key in changed:
            entries.append(_with_count(entry, changed[key]))
        elif key.startswith(OURS):
            entries.append(_renamed(entry, EARLIER + key.removeprefix(OURS)))
        else:
            entries.append(entry)
    notes = {f"{OURS}version": __version__, f"{OURS}plan_sha256": plan.sha256, PLAN_KEY: plan.model_dump_json()}
    return entries + [_text(key, value) for key, value in notes.items()]


def recorded_plan(metadata: dict[str, KeyValue]) -> str | None:
    """The plan that a pruned file carries, as JSON; None if it carries none."""
    entry = metadata.get(PLAN_KEY)
    return entry.value if entry is not None and isinstance(entry.value, str) else None


def encode_string(text: str) -> bytes:
    """A string as GGUF writes it: its length in bytes, then UTF-8."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _text(key: str, value: str) -> bytes:
    return encode_string(key) + struct.pack("<I", STRING) + encode_string(value)


def _with_count(entry: KeyValue, count: int) -> bytes:
    """The entry with another number in the type it has; in an array, 0 stays 0 (a block without experts)."""
    head = encode_string(entry.key) + struct.pack("<I", entry.kind)
    if entry.kind != ARRAY:
        return head + struct.pack(f"<{SCALARS[entry.kind]}", count)
    assert isinstance(entry.value, tuple) and entry.element in SCALARS
    values = [count if value else 0 for value in entry.value]
    return head + struct.pack(f"<IQ{len(values)}{SCALARS[entry.element]}", entry.element, len(values), *values)


def _renamed(entry: KeyValue, key: str) -> bytes:
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        data = file.read(entry.end - entry.start)
    return encode_string(key) + data[len(encode_string(entry.key)) :]
