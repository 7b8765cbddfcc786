"""The quantised formats in which experts are stored: which tensors stand for a weight and which accompany it.

A quantised weight is several tensors: its packed values, scales, zero points. Each has a name derived from the weight's
own, so that whatever says which expert a weight belongs to says the same of its companions. Nothing here dequantises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SHARED_BY_ALL = 1  # elements of a scale that one whole fused tensor shares
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})  # of a weight that is not quantised


class Companion(NamedTuple):
    """What a stored key that is not a weight of the model stands for.

    Attributes:
        base: The key of the weight in the unquantised spelling: ``...experts.3.up_proj.weight``.
        part: Its part of that weight: ``weight_scale_inv``.
        holds_weight: It holds the weight's values itself, rather than scales or zero points.
    """

    base: str
    part: str
    holds_weight: bool


@dataclass(frozen=True)
class StoredFormat:
    """How one quantiser spells a weight on disk.

    A companion in ``leaves`` stands beside ``weight`` (``up_proj.weight_scale``). Where a tensor holds all experts of a
    layer it follows the name of that tensor instead, either whole (``gate_up_proj_weight_scale``) or in place of
    ``weight`` (``gate_up_proj_scale``, ``gate_up_proj_blocks``).

    Attributes:
        name: Its name in tables.
        methods: Values of ``quant_method`` that write it.
        packed: Leaves that hold the values instead of ``weight``.
        leaves: The other leaves.
        dotted: Companions that follow the weight's own key after a dot.
        needs: A quantised weight is nothing without one of these.
        loads: What transformers does with it on a CPU.
        source: Where the names are from.
    """

    name: str
    methods: tuple[str, ...]
    packed: tuple[str, ...]
    leaves: tuple[str, ...]
    needs: tuple[str, ...]
    loads: str
    source: str
    dotted: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Every companion's name."""
        return (*self.packed, *self.leaves, *self.dotted)

    def companion(self, key: str) -> Companion | None:
        """What ``key`` stands for or accompanies, or None if it is no companion in this format.

        Only for keys that are not themselves tensors of the model, and only to be believed if ``base`` is one:
        ``router.per_expert_scale`` looks like the scale of a fused weight ``per_expert``.
        """
        for ending in self.dotted:
            if key.endswith(f".{ending}"):
                return Companion(key[: -len(ending) - 1], ending, False)
        stem, dot, last = key.rpartition(".")
        for leaf in (*self.packed, *self.leaves):
            if last == leaf:
                return Companion(f"{stem}{dot}weight", leaf, leaf in self.packed)
        # Longest first: `gate_up_proj_weight_scale` ends with `_scale` too.
        for ending, leaf in sorted(self._endings(), key=lambda pair: -len(pair[0])):
            if last.endswith(ending) and last != ending:
                return Companion(f"{stem}{dot}{last[: -len(ending)]}", leaf, leaf in self.packed)
        return None

    def _endings(self) -> list[tuple[str, str]]:
        """(what follows the name of a tensor that holds all experts, the leaf that it spells)."""
        leaves = (*self.packed, *self.leaves)
        short = [(leaf.removeprefix("weight"), leaf) for leaf in leaves if leaf.startswith("weight_")]
        return [(f"_{leaf}", leaf) for leaf in leaves if "_" in leaf] + short


NOT_LOADED = ("no", "attention only")
"""What :attr:`StoredFormat.loads` says where transformers computes nothing with quantised experts."""

FORMATS: dict[str, StoredFormat] = {
    stored.name: stored
    for stored in (
        StoredFormat(
            name="fp8",
            methods=("fp8", "mxfp8"),
            packed=(),
            # `scale` is DeepSeek-V4's spelling, `qscale_weight` and `qscale_act` Mistral's.
            leaves=("weight_scale_inv", "activation_scale", "scale", "qscale_weight", "qscale_act", "input_scale"),
            needs=("weight_scale_inv", "scale", "qscale_weight"),
            loads="dequantised",
            source="transformers quantizer_finegrained_fp8.py",
        ),
        StoredFormat(
            name="fbgemm-fp8",
            methods=("fbgemm_fp8",),
            packed=(),
            leaves=("weight_scale", "input_scale_ub"),
            needs=("weight_scale",),
            loads="no",
            source="transformers integrations/fbgemm_fp8.py",
        ),
        StoredFormat(
            name="mxfp4",
            methods=("mxfp4",),
            packed=("weight_blocks",),
            leaves=("weight_scales",),
            needs=("weight_scales",),
            loads="dequantised",
            source="transformers quantizer_mxfp4.py",
        ),
        StoredFormat(
            name="compressed-tensors",
            methods=("compressed-tensors", "compressed_tensors"),
            packed=("weight_packed",),
            leaves=(
                "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale",
                "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
            ),
            needs=("weight_scale",),
            loads="dequantised, with the compressed-tensors package",
            source="compressed-tensors compressors/*/base.py",
        ),
        StoredFormat(
            name="modelopt",
            methods=("modelopt", "modelopt_fp4", "modelopt_mixed"),
            packed=(),
            leaves=(
                "weight_scale", "weight_scale_2", "weight_zero_point", "input_scale", "output_scale",
                "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b",
            ),
            needs=("weight_scale",),
            loads="no",
            source="Model-Optimizer export/quant_utils.py, convert_hf_config.py",
        ),
        StoredFormat(
            name="quark",
            methods=("quark",),
            packed=(),
            leaves=(
                "weight_scale", "weight_zero_point", "input_scale", "input_zero_point",
                "output_scale", "output_zero_point", "bias_scale", "bias_zero_point",
            ),
            needs=("weight_scale",),
            loads="no",
            source="transformers quantizer_quark.py",
        ),
        StoredFormat(
            name="gptq",
            methods=("gptq", "auto-round", "auto_round", "intel/auto-round"),
            packed=("qweight",),
            leaves=("qzeros", "scales", "g_idx", "bias"),  # some writers give every layer a bias of zeros
            needs=("scales",),
            loads="no",
            source="GPTQModel nn_modules/qlinear, auto-round",
        ),
        StoredFormat(
            name="awq",
            methods=("awq",),
            packed=("qweight",),
            leaves=("qzeros", "scales", "bias"),
            needs=("scales",),
            loads="no",
            source="AutoAWQ modules/linear/gemm.py",
        ),
        StoredFormat(
            name="bitsandbytes-4bit",
            methods=("bitsandbytes_4bit",),
            packed=(),
            leaves=(),
            dotted=(
                "absmax", "quant_map", "nested_absmax", "nested_quant_map",
                "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4",
            ),
            needs=("absmax",),
            loads="attention only",
            source="transformers quantizer_bnb_4bit.py",
        ),
        StoredFormat(
            name="bitsandbytes-8bit",
            methods=("bitsandbytes_8bit",),
            packed=(),
            leaves=("SCB", "weight_format"),
            needs=("SCB",),
            loads="attention only",
            source="transformers quantizer_bnb_8bit.py",
        ),
    )
}  # fmt: skip


def format_of(method: str) -> StoredFormat | None:
    """The format that a ``quant_method`` writes, or None if it is not known here."""
    return next((stored for stored in FORMATS.values() if method in stored.methods), None)


def format_rows() -> list[dict[str, str]]:
    """The table of stored formats: what ``moeprune ls formats`` and docs/formats.md show."""
    return [
        {
            "name": stored.name,
            "quant_method": ", ".join(stored.methods),
            "tensors": ", ".join([*(stored.packed or ("weight",)), *stored.leaves, *stored.dotted]),
            "transformers on a CPU": stored.loads,
            "names from": stored.source,
        }
        for stored in FORMATS.values()
    ]
