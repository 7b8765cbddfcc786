"""What is good to know and no fault."""

from __future__ import annotations

from moeprune.anatomy.names import TOP_K
from moeprune.deploy.facts import DeployFacts
from moeprune.deploy.rule import INFO, LLAMA_CPP, SGLANG, VLLM, Problem, rule
from moeprune.deploy.serving import Serving

TRY_TOP_K = {
    VLLM: "--hf-overrides '{{\"{name}\": {k}}}'",
    SGLANG: "--json-model-override-args '{{\"{name}\": {k}}}'",
    LLAMA_CPP: "--override-kv ARCH.expert_used_count=int:{k}",
}


@rule("try-a-top-k", INFO, (VLLM, SGLANG, LLAMA_CPP), needs=("top_k",))
def try_a_top_k(facts: DeployFacts, serving: Serving) -> Problem | None:
    """Another top-k can be tried when the engine starts, without another export.

    Source: vllm --hf-overrides; sglang srt/arg_groups/fields/model.py:152; llama.cpp --override-kv.
    """
    assert facts.top_k is not None
    if facts.top_k == 1:
        return None
    held = facts.config or {}
    name = next((name for name in TOP_K if name in held), TOP_K[0])
    return Problem(
        f"to try a lower top-k than {facts.top_k} without another export, start {serving.engine} with",
        TRY_TOP_K[serving.engine].format(name=name, k=facts.top_k - 1) + ".",
    )


@rule("old-sglang", INFO, (SGLANG,))
def old_sglang(facts: DeployFacts, serving: Serving) -> Problem | None:
    """Old versions of SGLang expect DeepSeek-V3's 256 experts.

    Source: the README of RUCAIBox/EASYEP, which patches srt/layers/moe/topk.py and srt/models/deepseek_v2.py of SGLang
    0.4.3 to serve a pruned DeepSeek-R1. Read there, not tried.
    """
    if facts.model_type != "deepseek_v3" or facts.num_experts == 256:
        return None
    return Problem("SGLang 0.4.3 had to be patched to serve a DeepSeek-V3 of other than 256 experts.", "Use 0.5.")
