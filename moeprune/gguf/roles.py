"""Which tensors of a GGUF file have an expert axis. It is always the outermost, so an expert is a run of bytes.

Names: ``MODEL_TENSORS`` of the gguf package and ``create_tensor`` calls of llama.cpp's ``src/models/``. Experts are
found by the stem ``_exps`` and the outermost dimension, not by a list of projections; what looks like a tensor of
experts and is not understood is refused by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from moeprune.errors import UnsupportedModelError
from moeprune.gguf.header import GgufTensor

BLOCK = re.compile(r"blk\.(?P<block>\d+)\.(?P<stem>[a-z0-9_]+)(?P<rest>\..+)?")
ONE_EXPERT = re.compile(r"(?P<before>blk\.(?P<block>\d+)\.ffn_(?:gate|up|down)\.)(?P<expert>\d+)(?P<after>\..+)")
ROUTER = "ffn_gate_inp"
# By stem, then by what follows it: the number of dimensions that a tensor over all experts has.
STACKED = {".weight": 3, ".bias": 2, ".scale": 1, ".input_scale": 1}
ROUTED = {
    (ROUTER, ".weight"): 2, (ROUTER, ".bias"): 1,
    ("exp_probs_b", ".bias"): 1, ("exp_probs_b", ".weight"): 1, ("exp_probs_b", None): 1,
    ("exp_probs_b_vl", ".bias"): 1,
}  # fmt: skip
# Feed-forward tensors that see no single routed expert: dense and shared ones, norms, the latent space around experts.
WITHOUT_AXIS = re.compile(
    r"ffn_(gate|up|down)|ffn_(gate|up|down|gate_up)_shexp|ffn_gate_inp_shexp|ffn_latent_(down|up)|ffn_routed_(down|up|norm)"
    r"|(\w+_)?norm(_\w+)?"
)
SUSPECT = re.compile(r"exp(s|ert)|exp_|_exp\b|_inp\b|eid|rout|moe", re.IGNORECASE)
REASONS = {
    "chexps": "chunk experts, several routed experts to one (GroveMoE)",
    "tid2eid": "expert ids by token (hash routing); use the safetensors checkpoint, then convert the result",
}


@dataclass(frozen=True, slots=True)
class Stacked:
    """A tensor over all experts of a block.

    Attributes:
        block: The block.
        axis: The dimension of the experts, in ggml's order: the last but for ones (ERNIE stores [experts, 1]).
    """

    block: int
    axis: int


@dataclass(frozen=True, slots=True)
class Single:
    """A tensor of one expert, as llama.cpp's converter wrote Mixtral until April 2024 (``blk.0.ffn_up.3.weight``)."""

    block: int
    expert: int
    before: str
    after: str

    def renamed(self, expert: int) -> str:
        """Its name under another expert id."""
        return f"{self.before}{expert}{self.after}"


Role = Stacked | Single


def expert_roles(tensors: Mapping[str, GgufTensor], *, num_experts: int) -> dict[str, Role]:
    """The role of every tensor that depends on experts.

    Args:
        tensors: All tensors of the model.
        num_experts: Routed experts a block.

    Raises:
        UnsupportedModelError: If a tensor seems to depend on experts in a way that is not understood, or if a block's
            tensors of experts are incomplete.
    """
    roles: dict[str, Role] = {}
    for name, tensor in tensors.items():
        role = _role(tensor, num_experts)
        if role is not None:
            roles[name] = role
    blocks = {role.block for name, role in roles.items() if "_exps" in name or isinstance(role, Single)}
    for name, tensor in tensors.items():
        if name not in roles:
            _check_unrelated(tensor, blocks, num_experts)
    for block in sorted({role.block for role in roles.values()}):
        _check_block(block, blocks, roles)
    _check_singles(roles, num_experts)
    return roles


def _role(tensor: GgufTensor, num_experts: int) -> Role | None:
    single = ONE_EXPERT.fullmatch(tensor.name)
    if single is not None:
        expert = int(single["expert"])
        if expert >= num_experts:
            raise UnsupportedModelError(f"{tensor.file}: {tensor.name!r} is expert {expert} of {num_experts}.")
        return Single(int(single["block"]), expert, single["before"], single["after"])
    match = BLOCK.fullmatch(tensor.name)
    if match is None:
        return None
    stem, rest = match["stem"], match["rest"]
    if stem.endswith("_exps") and not stem.endswith("norm_exps"):
        dims = STACKED.get(rest or "")
    else:
        dims = ROUTED.get((stem, rest))
    if dims is None:
        return None
    if len(tensor.ne) < dims or tensor.ne[dims - 1] != num_experts or any(size != 1 for size in tensor.ne[dims:]):
        raise UnsupportedModelError(
            f"{tensor.file}: {tensor.name!r} has dimensions {list(tensor.ne)}, expected {dims} of which the last is "
            f"the {num_experts} experts."
        )
    if dims == 1 and tensor.kind.block > 1:
        raise UnsupportedModelError(
            f"{tensor.file}: {tensor.name!r} is {tensor.kind.name}: {tensor.kind.block} experts share a block, so that "
            "none can be taken out. Quantise the model again and keep this tensor in F32."
        )
    return Stacked(int(match["block"]), dims - 1)


def _check_unrelated(tensor: GgufTensor, blocks: set[int], num_experts: int) -> None:
    match = BLOCK.fullmatch(tensor.name)
    stem = match["stem"] if match else ""
    if stem == ROUTER and match and match["rest"] == ".scale" and len(tensor.ne) == 1:
        return  # Gemma 4 scales the router's input: one number a channel
    suspect = SUSPECT.search(stem or tensor.name) is not None
    here = match is not None and int(match["block"]) in blocks
    could_be = here and (stem.startswith("ffn") or suspect) and num_experts in tensor.ne
    reason = next((text for part, text in REASONS.items() if part in tensor.name), None)
    if reason is None and (WITHOUT_AXIS.fullmatch(stem) or not (could_be or (suspect and num_experts in tensor.ne))):
        return
    raise UnsupportedModelError(
        f"{tensor.file}: {tensor.name!r} {list(tensor.ne)} may depend on experts: "
        f"{reason or 'a tensor that moeprune does not know'}. Nothing is guessed; it cannot be pruned here."
    )


def _check_block(block: int, blocks: set[int], roles: Mapping[str, Role]) -> None:
    router = isinstance(roles.get(f"blk.{block}.{ROUTER}.weight"), Stacked)
    if router != (block in blocks):
        has, lacks = ("experts", f"{ROUTER}.weight") if not router else (f"{ROUTER}.weight", "experts")
        raise UnsupportedModelError(f"block {block} has {has} but no {lacks}: not a layout that can be pruned.")


def _check_singles(roles: Mapping[str, Role], num_experts: int) -> None:
    found = Counter((role.before, role.after) for role in roles.values() if isinstance(role, Single))
    for (before, after), number in found.items():
        if number != num_experts:
            raise UnsupportedModelError(f"{before}*{after}: {number} experts are stored, expected {num_experts}.")
