"""Which stored tensors belong to which module, and bringing a module's parameters into memory and out again."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.anatomy.axes import tied_names
from moeprune.anatomy.renamer import in_loading_order
from moeprune.calibrate.streaming.assemble import Assembler, Recipe
from moeprune.calibrate.streaming.skeleton import Skeleton
from moeprune.calibrate.streaming.stored import Stored
from moeprune.checkpoint.header import TensorInfo
from moeprune.errors import CheckpointError


class Weights:
    """The weights of a skeleton, read when they are asked for.

    Args:
        skeleton: The model.
        tensors: The stored tensors.
        device: Where parameters go.
    """

    def __init__(self, skeleton: Skeleton, tensors: Mapping[str, TensorInfo], *, device: torch.device):
        self.model = skeleton.model
        self.device = device
        self._skeleton = skeleton
        self._empty: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))
        self._tied = {name: names for names in tied_names(self.model) for name in names}
        self._assembler = Assembler(self.model, skeleton.quantizer, device)
        self._plan = [(_pattern(name), dtype) for name, dtype in skeleton.dtype_plan.items()]
        self._recipes: dict[str, Recipe] = {}
        for recipe in self._read_names(tensors):
            for name in recipe.names:
                self._recipes.setdefault(name, recipe)

    def names_in(self, path: str) -> list[str]:
        """Names of the parameters and persistent buffers in the module at ``path``."""
        return [name for name in self._empty if name.startswith(f"{path}.")]

    def is_empty(self, name: str) -> bool:
        """Whether a parameter is not in memory; persistent buffers are as the class made them until they are read."""
        module, leaf = self._holder(name)
        return (module._buffers if leaf in module._buffers else module._parameters)[leaf] is self._empty[name]

    def num_bytes(self, path: str) -> int:
        """Memory that the parameters in the module at ``path`` take."""
        return sum(self._empty[name].numel() * self._dtype(name).itemsize for name in self.names_in(path))

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Read parameters without putting them into the model; may run beside it in a thread.

        Raises:
            CheckpointError: If one is not stored or of another shape.
        """
        made: dict[str, Tensor] = {}
        for name in names:
            if name in made:
                continue
            recipe = self._recipe(name)
            parameter = self._empty[recipe.name]
            for key, tensor in self._assembler.make(recipe, like=parameter, dtype=self._dtype(recipe.name)).items():
                for tied in self._tied.get(key, [key]):
                    made[tied] = tensor
        for name in names:
            if name not in made or made[name].shape != self._empty[name].shape:
                given = list(made[name].shape) if name in made else "nothing"
                raise CheckpointError(f"{name!r} is stored as {given}, expected {list(self._empty[name].shape)}.")
        return made

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what :meth:`read` gave into the model."""
        parameters: dict[int, nn.Parameter] = {}
        for name, tensor in tensors.items():
            module, leaf = self._holder(name)
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
            else:
                known = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
                module._parameters[leaf] = known

    def free(self, path: str) -> None:
        """Put the parameters in the module at ``path`` back on the meta device."""
        for name in self.names_in(path):
            module, leaf = self._holder(name)
            where = module._buffers if leaf in module._buffers else module._parameters
            where[leaf] = self._empty[name]

    def _holder(self, name: str) -> tuple[Any, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _recipe(self, name: str) -> Recipe:
        for tied in (name, *self._tied.get(name, [])):
            if tied in self._recipes:
                return self._recipes[tied]
        raise CheckpointError(f"{self.model.config.name_or_path}: {name!r} of the model is not stored.")

    def _dtype(self, name: str) -> torch.dtype:
        """As transformers chooses it: by the plan, else what the class made the parameter."""
        return next((dtype for pattern, dtype in self._plan if pattern.search(name)), self._empty[name].dtype)

    def _read_names(self, tensors: Mapping[str, TensorInfo]) -> Iterator[Recipe]:
        """What is made of the stored tensors that the model has a place for."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [t for t in self._skeleton.transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in self._skeleton.transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self.model.base_model_prefix
        recipes: dict[str, Recipe] = {}
        for key in in_loading_order(tensors):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self._empty)
            if name not in self._empty and key in self._empty:
                name, pattern = key, None
            if name not in self._empty:
                continue
            converter = None if pattern is None else copy.deepcopy(by_pattern[pattern])
            recipe = recipes.setdefault(name, Recipe(name, converter, others=self._others(name, converter)))
            recipe.sources[pattern or key].append(Stored(tensors[key]))
        yield from recipes.values()

    def _others(self, name: str, converter: Any) -> tuple[str, ...]:
        first, *rest = converter.target_patterns if converter is not None else [""]
        bare = first.lstrip("^").rstrip("$")
        others = (name.replace(bare, target.lstrip("^").rstrip("$")) for target in rest)
        return tuple(other for other in others if other != name and other in self._empty)


def _pattern(glob: str) -> re.Pattern[str]:
    from transformers.core_model_loading import build_glob_alternation

    return build_glob_alternation([glob])[0]


def own_names(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters and persistent buffers that modules hold themselves, by path of the module."""
    names: dict[str, list[str]] = defaultdict(list)
    for name in model.state_dict(keep_vars=True):
        names[name.rpartition(".")[0]].append(name)
    return names
