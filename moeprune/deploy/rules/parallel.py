"""Spreading experts over devices."""

from __future__ import annotations

from dataclasses import replace

from moeprune.deploy.facts import DeployFacts
from moeprune.deploy.rule import ERROR, SERVERS, SGLANG, TRANSFORMERS, VLLM, WARNING, Problem, nearest, rule
from moeprune.deploy.serving import Serving

# How the types begin whose classes compare the two. Others cut each expert and do not care: Mixtral, OLMoE, gpt-oss.
REFUSE_TP_ABOVE_EXPERTS = {
    VLLM: (
        "cohere2_moe", "ernie4_5", "exaone_moe", "hy_v3", "interns1_pro", "laguna", "lfm2_moe", "mimo_v2",
        "minimax_m2", "minimax_m3", "qwen2_moe", "qwen3_", "step3",
    ),
    SGLANG: (
        "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "ernie4_5_vl", "exaone_moe", "glm4_moe", "glm4v_moe",
        "glm_moe_dsa", "hunyuan_v1_moe", "kimi_k2", "laguna", "lfm2_moe", "longcat_flash", "mimo_v2", "minimax_m2",
        "minimax_m3", "qwen2_moe", "qwen3_", "sarvam", "step3", "zaya",
    ),
}  # fmt: skip


@rule("tp-above-experts", ERROR, SERVERS)
def tp_above_experts(facts: DeployFacts, serving: Serving) -> Problem | None:
    """There are at least as many experts as tensor-parallel ranks, for models that are asked for it.

    Source: vllm models/qwen3_moe.py:154, sglang srt/models/deepseek_v2.py:714 and others ("Tensor parallel size ... is
    greater than the number of experts"); vllm models/mixtral.py and sglang srt/models/mixtral.py do not ask.
    """
    if serving.tp <= facts.num_experts or not facts.model_type.startswith(REFUSE_TP_ABOVE_EXPERTS[serving.engine]):
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


@rule("ep-even", ERROR, (SGLANG, TRANSFORMERS))
def ep_even(facts: DeployFacts, serving: Serving) -> Problem | None:
    """SGLang and transformers share experts evenly among expert-parallel ranks.

    Source: sglang srt/eplb/expert_location.py:256, srt/layers/moe/token_dispatcher/deepep.py:240 and mooncake.py:113,
    srt/layers/moe/flashinfer_megamoe.py:530; transformers distributed/expert_parallel.py:103.
    """
    if serving.engine == TRANSFORMERS:
        return _uneven(facts, replace(serving, redundant=0), "transformers refuses an uneven share", None)
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


def _uneven(facts: DeployFacts, serving: Serving, does: str, option: str | None) -> Problem | None:
    held, rest = divmod(facts.num_experts + serving.redundant, serving.ep)
    if rest == 0:
        return None
    fitting = nearest(facts, lambda n: (n + serving.redundant) % serving.ep == 0)
    ways = [f"keep {fitting}"] if fitting else []
    if held == 0 or not ways:
        ways.append(f"use --ep {max(n for n in range(1, serving.ep) if (facts.most or facts.num_experts) % n == 0)}")
    if option is not None:
        ways.append(f"use {option.format(more=serving.redundant + serving.ep - rest)}")
    redundant = f" and {serving.redundant} redundant ones" if serving.redundant else ""
    instead = ", or ".join(ways)
    return Problem(
        f"{facts.num_experts} experts{redundant} on {serving.ep} expert-parallel ranks: {does}.",
        f"{instead[0].upper()}{instead[1:]}.",
    )


@rule("ep-spans-tp", ERROR, (VLLM, TRANSFORMERS))
def ep_spans_tp(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The expert-parallel ranks of vLLM and transformers are all tensor-parallel ones, times data-parallel replicas.

    Source: vllm layers/fused_moe/config.py:1197-1221 (under --enable-expert-parallel the size is tensor- times
    data-parallel size); transformers distributed/configuration_utils.py:183 ("must be a multiple of tp_size").
    """
    if serving.ep == 1 or serving.ep % serving.tp == 0:
        return None
    return Problem(
        f"--ep {serving.ep} with --tp {serving.tp}: the expert-parallel size of {serving.engine} is a multiple of the "
        "tensor-parallel one.",
        f"Use --ep {-(-serving.ep // serving.tp) * serving.tp}.",
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
