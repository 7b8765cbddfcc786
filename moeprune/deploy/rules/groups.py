"""Group-limited routing: what each engine does with numbers of experts that its groups do not fit."""

from __future__ import annotations

from moeprune.deploy.facts import DeployFacts
from moeprune.deploy.rule import (
    ERROR,
    LLAMA_CPP,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    WARNING,
    Problem,
    is_power_of_two,
    nearest,
    rule,
)
from moeprune.deploy.serving import ENGINES, Serving

UNEQUAL = {
    VLLM: "routes silently without groups (and without a bias also by softmax and unscaled)",
    SGLANG: "stops at its first token",
    LLAMA_CPP: "aborts while loading",
    TRANSFORMERS: "stops, or on some token counts runs with scrambled groups",
}
UNGROUPED = "or turn the groups off (`moeprune plan --no-groups`, n_group = topk_group = 1)."


def _grouped(facts: DeployFacts, serving: Serving) -> bool:
    """Transformers alone reads in DeepSeek-V2's topk_method that the groups are not used."""
    method = None if facts.config is None else facts.config.get("topk_method")
    return facts.n_group > 1 and not (serving.engine == TRANSFORMERS and method == "greedy")


def _score_of(engine: str, facts: DeployFacts) -> str | None:
    """What an engine ranks groups by; None if not known."""
    if engine == LLAMA_CPP:
        return "top2"
    if engine == TRANSFORMERS:
        return facts.group_score
    return None if facts.bias is None else "top2" if facts.bias == "correction" else "max"


@rule("groups-divide", ERROR, ENGINES)
def groups_divide(facts: DeployFacts, serving: Serving) -> Problem | None:
    """All groups of a group-limited router are of one size.

    Source: llama.cpp src/llama-model.cpp:1367; vllm layers/fused_moe/router/grouped_topk_router.py:298; sglang
    srt/layers/moe/topk.py:1408; transformers models/deepseek_v3/modeling_deepseek_v3.py:139 checks nothing.
    """
    if not _grouped(facts, serving) or facts.num_experts % facts.n_group == 0:
        return None
    fitting = nearest(facts, lambda n: n % facts.n_group == 0 and n >= 2 * facts.n_group)
    return Problem(
        f"{facts.num_experts} experts do not fit into {facts.n_group} groups of one size: {serving.engine} "
        f"{UNEQUAL[serving.engine]}.",
        f"Keep {fitting or 2 * facts.n_group}, the same number of each group, {UNGROUPED}",
    )


@rule("group-size", ERROR, ENGINES)
def group_size(facts: DeployFacts, serving: Serving) -> Problem | None:
    """A group holds at least two experts where it is ranked by the sum of its two best.

    Source: vllm layers/fused_moe/router/grouped_topk_router.py:302 drops the groups at one expert each; llama.cpp
    src/llama-model.cpp:1365 and src/llama-graph.cpp:2103; sglang srt/layers/moe/topk.py:1802; transformers
    models/deepseek_v3/modeling_deepseek_v3.py:140.
    """
    if not _grouped(facts, serving) or facts.num_experts >= 2 * facts.n_group:
        return None
    # vLLM and llama.cpp want more experts than groups whatever the score is.
    if serving.engine in (SGLANG, TRANSFORMERS) and _score_of(serving.engine, facts) != "top2":
        return None
    does = UNEQUAL[VLLM] if serving.engine == VLLM else "stops"
    return Problem(
        f"{facts.num_experts} experts in {facts.n_group} groups leave fewer than two a group: {serving.engine} {does}.",
        f"Keep at least {2 * facts.n_group}, {UNGROUPED}",
    )


@rule("groups-reach-top-k", ERROR, ENGINES, needs=("top_k",))
def groups_reach_top_k(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The groups that a token may use hold as many experts as it needs.

    Source: transformers models/deepseek_v3/modeling_deepseek_v3.py:152, vllm
    layers/fused_moe/router/grouped_topk_router.py:146 and sglang
    srt/layers/moe/topk.py:1815 then select experts that were masked out, without a word.
    """
    assert facts.top_k is not None
    reach = facts.topk_group * (facts.num_experts // facts.n_group)
    if not _grouped(facts, serving) or reach >= facts.top_k:
        return None
    return Problem(
        f"a token may use {facts.topk_group} of {facts.n_group} groups, which hold {reach} experts, and its top-k is "
        f"{facts.top_k}: experts of groups that it may not use are selected.",
        f"Keep at least {-(-facts.top_k // facts.topk_group) * facts.n_group}, lower the top-k to {reach}, {UNGROUPED}",
    )


@rule("groups-in-use", ERROR, ENGINES)
def groups_in_use(facts: DeployFacts, serving: Serving) -> Problem | None:
    """A token may use at least one group and not more than there are; for llama.cpp fewer than there are.

    Source: llama.cpp src/llama-model.cpp:1368-1369; the others take a top-k over groups, which raises.
    """
    most = facts.n_group - 1 if serving.engine == LLAMA_CPP else facts.n_group
    if not _grouped(facts, serving) or 1 <= facts.topk_group <= most:
        return None
    does = "llama.cpp aborts while loading" if serving.engine == LLAMA_CPP else "the first token fails"
    return Problem(
        f"topk_group = {facts.topk_group} of n_group = {facts.n_group}: {does}.",
        "To turn groups off, set both to 1, as `moeprune plan --no-groups` does.",
    )


@rule("groups-by-name", WARNING, (VLLM, SGLANG, LLAMA_CPP), needs=("config",))
def groups_by_name(facts: DeployFacts, serving: Serving) -> Problem | None:
    """A config whose topk_method is greedy names no groups either.

    Source: transformers models/deepseek_v2/modeling_deepseek_v2.py:101 looks at topk_method alone; vllm
    models/deepseek_v2.py:384, sglang srt/models/deepseek_v2.py:791 and llama.cpp conversion/base.py:1523 at n_group
    alone.
    """
    assert facts.config is not None
    if facts.config.get("topk_method") != "greedy" or facts.n_group == 1:
        return None
    return Problem(
        f"topk_method is greedy and n_group is {facts.n_group}: transformers routes without groups, this engine in "
        "groups, so they give other answers.",
        "Set n_group and topk_group to 1, as `moeprune plan --no-groups` does.",
    )


@rule("group-score", WARNING, (VLLM, SGLANG, LLAMA_CPP), needs=("group_score", "bias"))
def group_score(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The engine ranks groups by what the model was trained with.

    Source: llama.cpp src/llama-graph.cpp:2103 takes the two best experts always; vllm
    layers/fused_moe/router/grouped_topk_router.py:118-129 and sglang srt/layers/moe/topk.py:1408, 1802 take them with a
    correction bias and the best one without; transformers' DeepSeek-V2 the best one.
    """
    own, engine = facts.group_score, _score_of(serving.engine, facts)
    if not _grouped(facts, serving) or own == engine:
        return None
    words = {"top2": "its two best experts", "max": "its best expert"}
    return Problem(
        f"this model ranks a group by {words[own or 'max']}, the engine by {words[engine or 'max']}: other experts are "
        "selected, pruned or not.",
        "Measure in that engine, or turn the groups off (`moeprune plan --no-groups`).",
    )


@rule("fused-grouped-top-k", WARNING, (VLLM,), needs=("top_k", "bias"))
def fused_grouped_top_k(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The fused kernel of vLLM for groups takes up to 32 groups and a top-k of up to 32.

    Source: vllm layers/fused_moe/router/grouped_topk_router.py:93-97.
    """
    assert facts.top_k is not None
    if facts.n_group == 1 or facts.bias != "correction" or (facts.n_group <= 32 and facts.top_k <= 32):
        return None
    return Problem(
        f"{facts.n_group} groups and top-{facts.top_k}: vLLM's fused kernel takes up to 32 of each, the slow path is "
        "used.",
        "Turn the groups off (`moeprune plan --no-groups`), or accept a slower router.",
    )


@rule("fused-deepseek-router", WARNING, (SGLANG,), needs=("top_k", "bias"))
def fused_deepseek_router(facts: DeployFacts, serving: Serving) -> Problem | None:
    """SGLang's FlashInfer router for DeepSeek-V3 takes powers of two, small groups and a top-k of up to 8.

    Source: sglang srt/layers/moe/topk.py:2022-2036; otherwise its Triton router runs (line 2079), with the same result.
    """
    assert facts.top_k is not None
    if facts.n_group == 1 or facts.bias != "correction":
        return None

    def fits(num_experts: int) -> bool:
        size = num_experts // facts.n_group
        return is_power_of_two(num_experts) and size <= 32 and size * facts.topk_group <= 128

    if fits(facts.num_experts) and facts.top_k <= 8:
        return None
    fitting = nearest(facts, fits)
    keeps = f"{fitting} experts keep it; otherwise c" if fitting else "C"
    return Problem(
        f"{facts.num_experts} experts, top-{facts.top_k}, {facts.topk_group} of {facts.n_group} groups: SGLang's "
        "FlashInfer router takes powers of two with small groups and up to top-8, the Triton router is used.",
        f"{keeps}ompare the router's time before and after.",
    )
