"""New names for the experts that a quantisation config mentions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moeprune.errors import UnsupportedModelError
from moeprune.export.expert_patterns import MARK, expert_groups, singled_out

_WRAPPERS = {"model", "language_model", "text_model", "transformer", "backbone", "decoder", "llm", "thinker"}
_NAME = r"[A-Za-z_]\w*"
_EXPERT = re.compile(  # model.layers.4.mlp.experts.17.up_proj
    rf"(?P<mark>{MARK.pattern})?"
    rf"(?P<head>(?P<layer>(?:{_NAME}\.)+\d+)\.(?:{_NAME}\.)*?experts\.(?:expert_)?)"
    r"(?P<expert>\d+)(?P<tail>|\*|\..*)"
)
_IN_BLOCK = re.compile(  # mlp.experts.17.up_proj, of every layer
    rf"(?P<head>(?:{_NAME}\.)*?experts\.(?:expert_)?)(?P<expert>\d+)(?P<tail>(?:\.{_NAME})*)"
)
_LITERAL = re.compile(r"[\w.-]*")
_MAY_BE_NUMBERED = re.compile(r"^\d|(?:^|\.)experts\.(?:expert_)?\d")
_REGEX_KEYS = {"dynamic"}  # GPTQModel: its keys are regexes, marked or not


Numbers = Mapping[int, int | None]


class ExpertNames:
    """The new names of experts after pruning.

    Args:
        numbers: For each decoder layer what becomes of the number of each expert; None if the expert goes.
        modules: Stored names of the experts' modules.
    """

    def __init__(self, numbers: Mapping[str, Numbers], *, modules: Iterable[str] = ()):
        self._numbers = {bare(layer): new for layer, new in numbers.items()}
        assert len(self._numbers) == len(numbers), f"layers that differ in their prefix alone: {list(numbers)}"
        self._num_experts = max(map(len, numbers.values()), default=0)
        self._groups = expert_groups(modules, layers=numbers, num_experts=self._num_experts)

    def remap(self, value: Any, path: str) -> Any:
        """A copy of the config below ``path`` in which list entries and keys have their new names.

        Raises:
            UnsupportedModelError: If one singles out experts in a way that cannot be carried over.
        """
        if isinstance(value, Mapping):
            is_regex = path.rpartition(".")[2] in _REGEX_KEYS
            names = {key: self._name(key, path, is_regex=is_regex) for key in value}
            return {new: self.remap(value[key], f"{path}.{key}") for key, new in names.items() if new is not None}
        if isinstance(value, list):
            return self._entries(value, path, self._in_block(value, path))
        if isinstance(value, str) and (_EXPERT.fullmatch(value) or _IN_BLOCK.fullmatch(value)):
            raise UnsupportedModelError(f"{path} names one expert, {value!r}, where a list of modules is expected.")
        return value

    def _entries(self, entries: list[Any], path: str, in_block: Mapping[str, str | None]) -> list[Any]:
        remapped: list[Any] = []
        for index, entry in enumerate(entries):
            if isinstance(entry, list):
                inner = self._entries(entry, path, in_block)
                remapped += [inner] if inner or not entry else []
            elif isinstance(entry, str):
                new = in_block[entry] if entry in in_block else self._name(entry, path)
                remapped += [] if new is None else [new]
            else:
                remapped.append(self.remap(entry, f"{path}[{index}]"))
        return remapped

    def _in_block(self, entries: list[Any], path: str) -> dict[str, str | None]:
        """New names of the entries that name experts of every layer (``modules_in_block_to_quantize``).

        They can stay if they name all experts: then the first ones name all that are left.
        """
        matches = [match for entry in _strings(entries) if (match := _IN_BLOCK.fullmatch(entry))]
        numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
        for match in matches:
            numbers[match["head"], match["tail"]].add(int(match["expert"]))
        for (head, tail), experts in numbers.items():
            if experts != set(range(self._num_experts)):
                raise UnsupportedModelError(
                    f"{path} names {len(experts)} of {self._num_experts} experts ({head}{min(experts)}{tail}, ...) "
                    f"without a layer, and each layer gets new numbers. {_NAME_THEM}"
                )
        kept = max((sum(new is not None for new in numbers.values()) for numbers in self._numbers.values()), default=0)
        return {match.group(): match.group() if int(match["expert"]) < kept else None for match in matches}

    def _name(self, entry: str, path: str, *, is_regex: bool = False) -> str | None:
        """The entry of the pruned model, or None if it names an expert that is gone."""
        match = _EXPERT.fullmatch(entry)
        if match and self._is_one_expert(match, is_regex=is_regex or bool(match["mark"])):
            return self._renumbered(match, path)
        if _LITERAL.fullmatch(entry) and not _MAY_BE_NUMBERED.search(entry):
            return entry
        example = singled_out(entry, self._groups, is_regex=is_regex)
        if example is not None:
            raise UnsupportedModelError(
                f"{path} has the pattern {entry!r}, which singles out experts by number: it matches {example[0]!r} but "
                f"not {example[1]!r}, and experts get new numbers. {_NAME_THEM}"
            )
        return entry

    def _is_one_expert(self, match: re.Match[str], *, is_regex: bool) -> bool:
        expert, tail = int(match["expert"]), match["tail"]
        if is_regex:  # as a regex `experts.1` also begins `experts.17`, and `experts.1.*` matches it
            return bool(re.fullmatch(rf"(?:\.{_NAME})+", tail))
        if tail == "*":  # ModelOpt's short form of all modules of an expert; `experts.1*` may be that of `experts.17`
            return expert == 0 or expert * 10 >= self._num_experts
        return True

    def _renumbered(self, match: re.Match[str], path: str) -> str | None:
        layer, expert = bare(match["layer"]), int(match["expert"])
        if layer not in self._numbers:
            raise UnsupportedModelError(
                f"{path} names {match.group()!r}, an expert of a layer that is not pruned. Pruned are "
                f"{', '.join(list(self._numbers)[:4])}, ... Remove the entry if it has no effect."
            )
        if expert not in self._numbers[layer]:
            raise UnsupportedModelError(
                f"{path} names {match.group()!r}, but the layer has experts 0 to {max(self._numbers[layer])}."
            )
        new = self._numbers[layer][expert]
        if new is None:
            return None
        tail = ".*" if match["tail"] == "*" else match["tail"]  # the new number may be the beginning of another
        return f"{match['mark'] or ''}{match['head']}{new}{tail}"


_NAME_THEM = (
    "Name the modules in full (model.layers.4.mlp.experts.17.up_proj), or prune the unquantised checkpoint and "
    "quantise the result."
)


def numbers_of(keep: Mapping[str, Sequence[int]], *, num_experts: int) -> dict[str, Numbers]:
    """What becomes of each expert's number, by layer, where experts are numbered from 0.

    Args:
        keep: Kept expert ids by path of the decoder layer, ascending.
        num_experts: Experts of a layer before pruning.
    """
    position = {layer: {expert: new for new, expert in enumerate(experts)} for layer, experts in keep.items()}
    return {layer: {expert: new.get(expert) for expert in range(num_experts)} for layer, new in position.items()}


def bare(layer: str) -> str:
    """A layer's path without the wrappers that the spellings of one model differ in: ``layers.4``.

    ``mtp.layers.0`` stays apart from ``layers.0``.
    """
    parts = layer.split(".")
    while parts[0] in _WRAPPERS and len(parts) > 2:
        parts = parts[1:]
    return ".".join(parts)


def _strings(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, list):
            yield from _strings(entry)
