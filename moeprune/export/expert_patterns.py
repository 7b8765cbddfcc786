"""Which experts a pattern in a quantisation config matches, as the runtimes that read it would."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import translate

MARK = re.compile(r"re:|\+:|-:")  # of a regex: compressed-tensors' and GPTQModel's
_NUMBER = re.compile(r"(?<=\.experts\.)(?:expert_)?\d+(?=\.|$)")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def singled_out(entry: str, groups: Mapping[str, list[str]], *, is_regex: bool) -> tuple[str, str] | None:
    """A module that a pattern matches and one that it does not, which differ in the expert's number alone.

    A marked pattern is a regex, applied with ``re.match`` by compressed-tensors, GPTQModel and vLLM. Without a mark the
    same text is a regex to transformers, from the start and up to a dot, or a plain suffix
    (``quantizers_utils.should_convert_module``), and a glob to ModelOpt and Quark. It must hold in every reading, since
    two that each single out some experts may together match them all.

    Args:
        entry: The pattern.
        groups: From :func:`expert_groups`.
        is_regex: It is a regex, marked or not.

    Returns:
        None if all experts of each group are alike to it.
    """
    mark = MARK.match(entry)
    text = entry[mark.end() :] if mark else entry
    readings = [f"(?:{text})"]
    if not (mark or is_regex):
        readings += [f"(?:{text})(?=\\.|$)", f".*(?:{text})", translate(text), f".*(?:{re.escape(text)})$"]
    for pattern in filter(None, map(_compile, readings)):
        for names in groups.values():
            matched = [bool(pattern.match(name)) for name in names]
            if any(matched) and not all(matched):
                return names[matched.index(True)], names[matched.index(False)]
    return None


def expert_groups(modules: Iterable[str], *, layers: Iterable[str], num_experts: int) -> dict[str, list[str]]:
    """The modules that differ in the expert's number alone, by their name with ``*`` for it.

    Args:
        modules: Names of stored modules; those without an expert's number are passed over.
        layers: Paths of the pruned layers, for names where the checkpoint stores experts fused.
        num_experts: Experts of a layer.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    usual = (f"{layer}.mlp.experts.{expert}.{projection}"
             for layer in layers for expert in range(num_experts) for projection in _PROJECTIONS)  # fmt: skip
    stored = [(name, match) for name in modules if (match := _NUMBER.search(name))]
    for name, match in stored or ((name, _NUMBER.search(name)) for name in usual):
        assert match is not None
        groups[f"{name[: match.start()]}*{name[match.end() :]}"].append(name)
    return groups


def _compile(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error:
        return None  # a glob such as `*.experts.*` is no regex
