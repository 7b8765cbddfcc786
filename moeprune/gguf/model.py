"""What a GGUF file says about its experts."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.gguf.file import GgufFile
from moeprune.gguf.roles import BLOCK, Role, Single, expert_roles


@dataclass(frozen=True)
class GgufModel:
    """A Mixture-of-Experts model in GGUF.

    Attributes:
        file: The file.
        architecture: ``general.architecture``, which prefixes the model's keys.
        num_experts: Routed experts a block.
        top_k: Active experts a token, for each value that the file names (one; several where blocks differ).
        n_group: Expert groups; None where the file does not say.
        topk_group: Groups a token may use; None where the file does not say.
        blocks: Blocks with experts that run for every token, ascending.
        mtp_blocks: Blocks with experts that only predict further tokens (multi-token prediction), ascending.
        num_blocks: All blocks.
        num_trunk: Blocks that run for every token; those after them are for multi-token prediction.
        roles: Tensors that depend on experts.
    """

    file: GgufFile
    architecture: str
    num_experts: int
    top_k: tuple[int, ...]
    n_group: int | None
    topk_group: int | None
    blocks: tuple[int, ...]
    mtp_blocks: tuple[int, ...]
    num_blocks: int
    num_trunk: int
    roles: dict[str, Role]

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(prod(tensor.ne) for tensor in self.file.tensors.values())

    @property
    def expert_parameters(self) -> int:
        """Parameters of all routed experts, routers not counted."""
        return sum(prod(self.file.tensors[name].ne) for name in self.expert_tensors)

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of all routed experts, routers not counted."""
        return sum(self.file.tensors[name].num_bytes for name in self.expert_tensors)

    def active(self, *, num_experts: int, top_k: int) -> int:
        """Parameters that take part in one token's forward pass, embeddings and output head included."""
        experts = set(self.expert_tensors)
        total = 0.0
        for name, tensor in self.file.tensors.items():
            block = BLOCK.match(name)
            if block is not None and int(block["block"]) >= self.num_trunk:
                continue
            share = top_k if name in experts else num_experts if name in self.roles else self.num_experts
            total += prod(tensor.ne) * share / self.num_experts
        return round(total)

    @property
    def expert_tensors(self) -> tuple[str, ...]:
        """Names of the routed experts' tensors, routers not counted."""
        return tuple(
            name for name, role in self.roles.items()
            if isinstance(role, Single) or "_exps" in name
        )  # fmt: skip


def read_model(file: GgufFile) -> GgufModel:
    """Find the experts of a GGUF file.

    Args:
        file: The opened file.

    Raises:
        CheckpointError: If the metadata contradicts itself or the tensors.
        UnsupportedModelError: If it is not a language model, has no experts, or stores them in a way that is not
            understood.
    """
    architecture = file.text("general.architecture")
    kind = file.text("general.type") or "model"
    if architecture is None or kind != "model":
        what = "without general.architecture" if architecture is None else f"of type {kind!r}"
        raise UnsupportedModelError(f"{file.path}: a GGUF file {what}. Give the file of the language model.")
    num_experts = file.count(f"{architecture}.expert_count") or 0
    if num_experts < 2:
        raise UnsupportedModelError(
            f"{file.path}: a dense model ({architecture}, expert_count {num_experts}): there are no experts to prune."
        )
    num_blocks = file.count(f"{architecture}.block_count")
    if num_blocks is None:
        raise CheckpointError(f"{file.path}: {architecture}.block_count is missing.")
    roles = expert_roles(file.tensors, num_experts=num_experts)
    blocks = sorted({role.block for role in roles.values()})
    if not blocks or blocks[-1] >= num_blocks:
        raise CheckpointError(
            f"{file.path}: expert_count is {num_experts} and block_count {num_blocks}, but the tensors have experts in "
            f"blocks {blocks}."
        )
    trunk = num_blocks - (file.count(f"{architecture}.nextn_predict_layers") or 0)
    if blocks[0] >= trunk:
        raise UnsupportedModelError(
            f"{file.path}: only blocks for multi-token prediction have experts. Give the file of the whole model."
        )
    return GgufModel(
        file=file,
        architecture=architecture,
        num_experts=num_experts,
        top_k=_top_k(file, f"{architecture}.expert_used_count"),
        n_group=file.count(f"{architecture}.expert_group_count"),
        topk_group=file.count(f"{architecture}.expert_group_used_count"),
        blocks=tuple(block for block in blocks if block < trunk),
        mtp_blocks=tuple(block for block in blocks if block >= trunk),
        num_blocks=num_blocks,
        num_trunk=trunk,
        roles=roles,
    )


def _top_k(file: GgufFile, key: str) -> tuple[int, ...]:
    """Distinct values of expert_used_count: a number, or since 2026 one for each block with 0 for dense ones."""
    entry = file.metadata.get(key)
    values = entry.value if entry is not None and isinstance(entry.value, tuple) else (file.count(key),)
    found = sorted({value for value in values if isinstance(value, int) and value > 0})
    if not found or not all(isinstance(value, int) and value >= 0 for value in values):
        given = None if entry is None else entry.value
        raise CheckpointError(f"{file.path}: {key} is {given!r}, expected the number of active experts.")
    return tuple(found)
