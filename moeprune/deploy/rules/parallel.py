"""Spreading experts over devices."""

from __future__ import annotations

from moeprune.deploy.facts import DeployFacts
from moeprune.deploy.rule import ERROR, SERVERS, SGLANG, VLLM, WARNING, Problem, nearest, rule
from moeprune.deploy.serving import Serving


@rule("tp-above-experts", ERROR, SERVERS)
def tp_above_experts(facts: DeployFacts, serving: Serving) -> Problem | None:
    """There are at least as many experts as tensor-parallel ranks.

    Source: vllm models/qwen3_moe.py:154 and sglang srt/models/deepseek_v2.py:714 ("Tensor parallel size ... is greater
    than the number of experts").
    """
    if serving.tp <= facts.num_experts:
        return None
    return Problem(
        f"--tp {serving.tp} with {facts.num_experts} experts is refused.",
        f"Use --tp {facts.num_experts} or less.",
    )


@rule("tp-cuts-experts", ERROR, SERVERS, needs=("expert_width", "quantisation"))
def tp_cuts_experts(facts: DeployFacts, serving: Serving) -> Problem | None:
    """Each expert can be cut into equal slices of whole quantisation blocks.

    Source: vllm layers/fused_moe/config.py:1341 and layers/quantization/utils/fp8_utils.py:1359-1374; sglang
    srt/layers/moe/fused_moe_triton/layer.py:427.
    """
    assert facts.expert_width is not None and facts.quantisation is not None
    shards, block = serving.width_shards, max(facts.quantisation.block or (1,))
    if shards == 1 or facts.expert_width % (shards * block) == 0:
        return None
    blocks = f" of whole blocks of {block}" if block > 1 else ""
    fitting = [n for n in range(1, shards) if facts.expert_width % (n * block) == 0]
    slices = f"--tp {fitting[-1]}, or " if fitting else ""
    return Problem(
        f"experts of width {facts.expert_width} cannot be cut into {shards} equal slices{blocks}.",
        f"Use {slices}--ep {serving.tp}, which keeps experts whole.",
    )


@rule("tp-cuts-groups", WARNING, (VLLM,), needs=("expert_width", "quantisation"))
def tp_cuts_groups(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The Marlin kernel of vLLM for 4-bit experts wants slices of whole quantisation groups, 64 at least.

    Source: vllm layers/quantization/utils/marlin_utils.py:354-387.
    """
    assert facts.expert_width is not None and facts.quantisation is not None
    shards = serving.width_shards
    if facts.quantisation.kind != "int4" or shards == 1 or facts.expert_width % shards:
        return None
    step = max(64, facts.quantisation.group or 1)
    if facts.expert_width // shards % step == 0:
        return None
    return Problem(
        f"slices of {facts.expert_width // shards} are not a multiple of {step}: vLLM pads 4-bit experts or leaves "
        "its Marlin kernel.",
        f"Use fewer tensor-parallel ranks, or --ep {serving.tp}, which keeps experts whole.",
    )


@rule("ep-even", ERROR, (SGLANG,))
def ep_even(facts: DeployFacts, serving: Serving) -> Problem | None:
    """SGLang shares experts evenly among expert-parallel ranks.

    Source: sglang srt/eplb/expert_location.py:256, srt/layers/moe/token_dispatcher/deepep.py:240 and mooncake.py:113,
    srt/layers/moe/flashinfer_megamoe.py:530.
    """
    return _uneven(facts, serving, "SGLang asserts an even share", "--ep-num-redundant-experts {more}")


@rule("eplb-even", ERROR, (VLLM,))
def eplb_even(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The load balancer of vLLM (EPLB), which redundant experts need, shares experts evenly.

    Source: vllm layers/fused_moe/layer.py:259-272.
    """
    if serving.redundant == 0:
        return None
    return _uneven(facts, serving, "vLLM's EPLB refuses an uneven share", "num_redundant_experts = {more}")


@rule("ep-uneven", WARNING, (VLLM,))
def ep_uneven(facts: DeployFacts, serving: Serving) -> Problem | None:
    """Expert-parallel ranks hold the same number of experts: the fullest one sets the pace.

    Source: vllm layers/fused_moe/expert_map_manager.py:60-64 gives the first ranks one more; EPLB refuses it
    (layer.py:262).
    """
    if serving.redundant > 0:
        return None
    does = "some ranks hold one expert more and EPLB is refused"
    return _uneven(facts, serving, does, "EPLB with num_redundant_experts = {more}")


def _uneven(facts: DeployFacts, serving: Serving, does: str, option: str) -> Problem | None:
    rest = (facts.num_experts + serving.redundant) % serving.ep
    if rest == 0:
        return None
    more = option.format(more=serving.redundant + serving.ep - rest)
    redundant = f" and {serving.redundant} redundant ones" if serving.redundant else ""
    return Problem(
        f"{facts.num_experts} experts{redundant} on {serving.ep} expert-parallel ranks: {does}.",
        f"Keep {nearest(facts, lambda n: (n + serving.redundant) % serving.ep == 0)}, or use {more}.",
    )


@rule("ep-within-tp", ERROR, (SGLANG,))
def ep_within_tp(facts: DeployFacts, serving: Serving) -> Problem | None:
    """SGLang takes its expert-parallel ranks from the tensor-parallel ones.

    Source: sglang srt/runtime_context.py:154, 308 (tp = ep * moe_dp * moe_tp).
    """
    if serving.tp == 1 or serving.tp % serving.ep == 0:
        return None
    return Problem(
        f"--ep {serving.ep} with --tp {serving.tp}: SGLang's expert-parallel size divides its tensor-parallel size.",
        f"Use --ep {max(n for n in range(1, serving.tp + 1) if serving.tp % n == 0 and n <= serving.ep)}.",
    )
