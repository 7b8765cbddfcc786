"""From stored tensors to a parameter, a parameter at a time.

transformers collects the tensors of all experts, stacks them and joins the projections, so that a parameter is in
memory three times while it is made. Where a parameter is nothing but stored tensors side by side, which is so in most
families, each is read straight to its place in it, dequantised on the way if it must be; otherwise transformers'
operations are applied to this one parameter.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeprune.calibrate.streaming.stored import Stored
from moeprune.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Recipe:
    """How a parameter is made.

    Attributes:
        name: Its name; that of the first one where several are made together.
        converter: transformers' converter, or None where the stored tensor is the parameter.
        sources: The stored tensors by the converter's source pattern, in loading order.
        others: Further parameters that are made with it.
    """

    name: str
    converter: Any
    sources: dict[str, list[Stored]] = field(default_factory=lambda: defaultdict(list))
    others: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters that are made."""
        return (self.name, *self.others)


@dataclass(frozen=True)
class Assembler:
    """Makes parameters.

    Attributes:
        model: The model, its parameters on the meta device.
        quantizer: transformers' quantizer, or None.
        device: Where parameters go.
    """

    model: PreTrainedModel
    quantizer: Any
    device: torch.device

    def make(self, recipe: Recipe, *, like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read and convert what ``recipe`` says.

        Args:
            recipe: The recipe.
            like: The parameter on the meta device.
            dtype: Its dtype.

        Returns:
            The tensors by name.

        Raises:
            CheckpointError: If stored tensors cannot be read or do not make the parameter.
        """
        if recipe.converter is None:
            ((stored,),) = recipe.sources.values()
            return {recipe.name: stored.read(dtype, self.device)}
        layers = _side_by_side(recipe, like)
        if layers is None:
            return self._converted(recipe, dtype)
        place = torch.empty(like.shape, dtype=dtype, device=self.device)
        for number, slots in enumerate(layers):
            begin = 0
            for tensor in self._loaded(recipe, slots):
                rows = tensor.info.shape[0] if isinstance(tensor, Stored) else tensor.shape[0]
                part = place[number, begin : begin + rows]
                tensor.read_to(part) if isinstance(tensor, Stored) else part.copy_(tensor)
                begin += rows
            if begin != (place.shape[1] if place.ndim > 1 else 0):
                raise self._mismatch(recipe, like)
        return {recipe.name: place}

    def _loaded(self, recipe: Recipe, slots: dict[str, Stored]) -> Sequence[Stored | Tensor]:
        """The tensors of one expert in order, dequantised if they are stored quantised."""
        loads = _load_operations(recipe.converter)
        if not loads:
            return list(slots.values())
        values: dict[str, Any] = {pattern: [stored.read(None, self.device)] for pattern, stored in slots.items()}
        for operation in loads:
            values = operation.convert(
                values,
                source_patterns=recipe.converter.source_patterns,
                target_patterns=recipe.converter.target_patterns,
                full_layer_name=recipe.name,
                model=self.model,
                config=self.model.config,
                missing_keys=None,
            )
        return [values[pattern][0] for pattern in recipe.converter.source_patterns if pattern in values]

    def _converted(self, recipe: Recipe, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors as transformers' operations make them."""
        from transformers.core_model_loading import SkipParameters
        from transformers.utils.loading_report import LoadStateDictInfo

        converter = copy.deepcopy(recipe.converter)
        for pattern, stored in recipe.sources.items():
            for one in stored:
                as_dtype = dtype if self.quantizer is None else self.quantizer.get_new_dtype(converter, one, dtype)
                converter.add_tensor(recipe.name, one.info.name, pattern, _later(one, as_dtype, self.device))
        problems = LoadStateDictInfo(set(), set(), set(), [], {}, set())
        try:
            made = converter.convert(
                recipe.name,
                model=self.model,
                config=self.model.config,
                hf_quantizer=self.quantizer,
                loading_info=problems,
            )
        except SkipParameters as error:
            reason = "; ".join(str(text) for text in problems.conversion_errors.values())
            raise CheckpointError(f"{recipe.name!r} cannot be made of what is stored: {reason}") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _mismatch(self, recipe: Recipe, like: Tensor) -> CheckpointError:
        stored = next(iter(recipe.sources.values()))[0].info
        return CheckpointError(
            f"{stored.file}: {stored.name!r} and its like do not make {recipe.name!r} of shape {list(like.shape)}."
        )


def _later(stored: Stored, dtype: torch.dtype | None, device: torch.device) -> Any:
    return lambda: stored.read(dtype, device)


def _load_operations(converter: Any) -> list[Any]:
    """The operations of a converter that dequantise; they come first."""
    return [operation for operation in converter.operations if getattr(operation, "hf_quantizer", None) is not None]


def _side_by_side(recipe: Recipe, like: Tensor) -> list[dict[str, Stored]] | None:
    """The stored tensors of each slice along the first axis, in order, where the parameter is nothing but those.

    That is: tensors of single experts stacked along a new first axis, and their projections joined along the next.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    converter = recipe.converter
    rest = converter.operations[len(_load_operations(converter)) :]
    kinds = [type(operation) for operation in rest]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]) or len(converter.target_patterns) > 1:
        return None
    if rest[0].dim != 0 or (len(rest) > 1 and rest[1].dim != 1) or (like.ndim < 2):
        return None
    patterns = [pattern for pattern in converter.source_patterns if pattern in recipe.sources]
    if any(len(recipe.sources[pattern]) != like.shape[0] for pattern in patterns):
        return None
    return [{pattern: recipe.sources[pattern][i] for pattern in patterns} for i in range(like.shape[0])]
