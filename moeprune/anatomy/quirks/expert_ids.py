"""Tensors whose values are expert ids: DeepSeek-V4 looks the experts of its first layers up by token id.

The shape of such a table does not change with the number of experts, so that a pruned checkpoint with the old table
loads without a remark and routes to experts that are not there, or to others than it was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from moeprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

    from moeprune.anatomy.anatomy import MoeLayer
    from moeprune.checkpoint.header import TensorInfo

TABLE = "tid2eid"
INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "I8": "i1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}


def find_expert_ids(model_type: str, skeleton: nn.Module, layers: Sequence[MoeLayer]) -> dict[str, str]:
    """The tables of a model and the layer that each belongs to.

    Raises:
        UnsupportedModelError: If a router holds whole numbers of another kind.
    """
    routers = {layer.router: layer.name for layer in layers}
    tables = {}
    for name, tensor in skeleton.state_dict().items():
        module, _, leaf = name.rpartition(".")
        layer = next((routers[path] for path in routers if module == path or module.startswith(f"{path}.")), None)
        if layer is None or tensor.is_floating_point():
            continue
        if leaf != TABLE:
            raise UnsupportedModelError(
                f"{model_type}: its router holds whole numbers in {name!r}, which may be expert ids; what they mean is "
                "unknown."
            )
        tables[name] = layer
    return tables


def remap_expert_ids(
    table: Int[ndarray, "tokens top_k"], *, keep: Sequence[int], num_experts: int, top_k: int
) -> Int[ndarray, "tokens new_top_k"]:
    """A table of expert ids for the kept experts.

    A token keeps those of its experts that stay, in their order; the places of the others go to kept experts that it
    does not have yet, taken in turn by token id so that they share the load evenly.

    Args:
        table: Expert ids before pruning, one row a token id.
        keep: Kept expert ids, ascending; the first becomes expert 0.
        num_experts: Experts before pruning.
        top_k: Experts a token after pruning.

    Returns:
        The same dtype, ``top_k`` different ids below ``len(keep)`` in each row.

    Raises:
        UnsupportedModelError: If the table names experts that do not exist.
    """
    if table.size and (table.min() < 0 or table.max() >= num_experts):
        raise UnsupportedModelError(
            f"the table of expert ids has values from {table.min()} to {table.max()}, the model has {num_experts} "
            "experts."
        )
    tokens, kept = len(table), len(keep)
    position = np.full(num_experts, -1, dtype=np.int64)
    position[list(keep)] = np.arange(kept)
    # For each token all kept experts, its own first, then the others in turn from a start that depends on the token.
    rank = (np.arange(kept)[None, :] - np.arange(tokens)[:, None]) % kept + table.shape[1]
    new = position[table]
    for slot in reversed(range(table.shape[1])):
        rows = np.flatnonzero(new[:, slot] >= 0)
        rank[rows, new[rows, slot]] = slot
    return np.argsort(rank, axis=1, kind="stable")[:, :top_k].astype(table.dtype)


def remap_stored_ids(data: bytes, *, info: TensorInfo, keep: Sequence[int], num_experts: int, top_k: int) -> bytes:
    """:func:`remap_expert_ids` on the bytes of a stored tensor.

    Args:
        data: All its bytes.
        info: Its header entry.
        keep: Kept expert ids, ascending.
        num_experts: Experts before pruning.
        top_k: Experts a token after pruning.

    Raises:
        UnsupportedModelError: If it is not a matrix of whole numbers, or names experts that do not exist.
    """
    if info.dtype not in INTEGERS or len(info.shape) != 2:
        raise UnsupportedModelError(f"{info.file}: {info.name!r}, {info.dtype} {list(info.shape)}, is no table of ids.")
    table = np.frombuffer(data, dtype=INTEGERS[info.dtype]).reshape(info.shape)
    return remap_expert_ids(table, keep=keep, num_experts=num_experts, top_k=top_k).tobytes()
