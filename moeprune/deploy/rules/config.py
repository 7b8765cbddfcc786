"""Keys of config.json that an engine needs and that transformers may drop."""

from __future__ import annotations

from moeprune.deploy.facts import DeployFacts
from moeprune.deploy.rule import ERROR, LLAMA_CPP, SERVERS, SGLANG, TRANSFORMERS, VLLM, WARNING, Problem, rule
from moeprune.deploy.serving import Serving

# Models whose correction bias vLLM and SGLang only create if config.json names the method.
NEED_TOPK_METHOD = ("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "kimi_k2")
LITE_LAYERS = (26, 27)


@rule("topk-method", ERROR, SERVERS, needs=("config",))
def topk_method(facts: DeployFacts, serving: Serving) -> Problem | None:
    """DeepSeek-V3's config.json says topk_method noaux_tc, or the correction bias has no place to go.

    Source: vllm models/deepseek_v2.py:327 (KeyError on e_score_correction_bias); sglang srt/models/deepseek_v2.py:519.
    transformers' DeepseekV3Config does not write it.
    """
    assert facts.config is not None
    if facts.model_type not in NEED_TOPK_METHOD or facts.config.get("topk_method") == "noaux_tc":
        return None
    return Problem(
        "config.json does not say topk_method = noaux_tc: no correction bias is made, and the one in the checkpoint "
        "has no place to go.",
        'Add "topk_method": "noaux_tc" and "scoring_func": "sigmoid" to config.json.',
    )


@rule("rope-theta", WARNING, (VLLM, SGLANG, TRANSFORMERS), needs=("config",))
def rope_theta(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The base of the rotary embedding is in config.json also where transformers 4 looks for it.

    Source: transformers 5 writes it inside rope_parameters; transformers 4 reads rope_theta and otherwise takes its
    default, which gives a wrong model and no error.
    """
    assert facts.config is not None
    inside = facts.config.get("rope_parameters")
    if not isinstance(inside, dict) or "rope_theta" not in inside or "rope_theta" in facts.config:
        return None
    return Problem(
        f"rope_theta ({inside['rope_theta']:g}) is inside rope_parameters only: transformers 4, and any engine on top "
        "of it, takes its default.",
        f'Add "rope_theta": {inside["rope_theta"]:g} to config.json.',
    )


@rule("deepseek-v2-lite-layers", ERROR, (LLAMA_CPP,), needs=("config",))
def deepseek_v2_lite_layers(facts: DeployFacts, serving: Serving) -> Problem | None:
    """llama.cpp knows DeepSeek-V2-Lite by its 26 or 27 layers, and wants a q_lora_rank of all others.

    Source: llama.cpp src/models/deepseek2.cpp:8.
    """
    assert facts.config is not None
    layers = facts.config.get("num_hidden_layers")
    if facts.model_type not in ("deepseek_v2", "deepseek_v3") or facts.config.get("q_lora_rank") is not None:
        return None
    # The third shape that it knows (Kanana-2: 48 layers, this vocabulary).
    if layers in LITE_LAYERS or (layers == 48 and facts.config.get("vocab_size") == 128256):
        return None
    return Problem(
        f"{layers} layers without q_lora_rank: llama.cpp does not take it for a DeepSeek-V2-Lite and misses "
        "attention.q_lora_rank.",
        "Convert a model with all its layers; fewer experts change nothing here.",
    )
