"""How many experts, and how many of them are active."""

from __future__ import annotations

from moeprune.anatomy.names import N_GROUP, NUM_EXPERTS, TOP_K
from moeprune.deploy.facts import DeployFacts
from moeprune.deploy.rule import ERROR, LLAMA_CPP, SERVERS, SGLANG, TRANSFORMERS, VLLM, WARNING, Problem, rule
from moeprune.deploy.serving import ENGINES, Serving

LLAMA_MAX_EXPERTS = 1024
# The routers of these types select this many experts whatever the config says.
FIXED_TOP_K = {"phimoe": 2}
# sglang srt/models/hunyuan.py:134 and transformers models/hunyuan_v1_moe/modeling_hunyuan_v1_moe.py:229 read a number
# for each layer.
LISTS_OF_TOP_K = ("hunyuan_v1_moe",)
# The name that transformers 4 reads where transformers 5 writes another one.
NAME_OF_TRANSFORMERS_4 = {
    "qwen3_moe": "num_experts", "qwen3_vl_moe": "num_experts", "qwen3_vl_moe_text": "num_experts",
}  # fmt: skip


@rule("top-k-fits", ERROR, ENGINES, needs=("top_k",))
def top_k_fits(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The top-k lies between 1 and the number of experts.

    Source: llama.cpp src/llama-model.cpp:1362; vllm layers/fused_moe/experts/trtllm_fp8_moe.py:465; transformers' topk
    raises "selected index k out of range".
    """
    assert facts.top_k is not None
    if 1 <= facts.top_k <= facts.num_experts:
        return None
    return Problem(
        f"a token cannot use {facts.top_k} of {facts.num_experts} experts: no engine loads that.",
        f"Keep at least {facts.top_k} experts, or lower the top-k to {facts.num_experts}.",
    )


@rule("fixed-top-k", ERROR, (VLLM, SGLANG, TRANSFORMERS), needs=("top_k",))
def fixed_top_k(facts: DeployFacts, serving: Serving) -> Problem | None:
    """Routers that always select the same number of experts are left at that number.

    Source: vllm models/phimoe.py:236 and sglang srt/models/phimoe.py:164 assert it; transformers
    models/phimoe/modeling_phimoe.py ignores the config's number.
    """
    fixed = FIXED_TOP_K.get(facts.model_type)
    if fixed is None or facts.top_k == fixed:
        return None
    does = "the config's number is ignored" if serving.engine == TRANSFORMERS else "the first token fails"
    return Problem(
        f"the router of {facts.model_type} selects {fixed} experts, the config says {facts.top_k}: {does}.",
        f"Leave the top-k at {fixed}.",
    )


@rule("one-top-k", ERROR, (VLLM, SGLANG, TRANSFORMERS), needs=("config",))
def one_top_k(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The top-k is one number, not a list with one for each layer (Hunyuan's excepted).

    Source: transformers' strict configs refuse a list; vllm models/qwen3_moe.py and sglang srt/models/qwen3_moe.py read
    one number. vLLM's Transformers backend reads lists (vllm models/transformers/moe.py:286), and llama.cpp reads an
    array (src/llama-model.cpp:1333).
    """
    assert facts.config is not None
    name = next((name for name in TOP_K if isinstance(facts.config.get(name), list)), None)
    if name is None or facts.model_type in LISTS_OF_TOP_K:
        return None
    return Problem(
        f"{name} is a list, and one number is read: the config is refused.",
        "Use one top-k for all layers. A top-k for each layer can be served by llama.cpp from a GGUF file whose "
        "expert_used_count is an array, or by vLLM's Transformers backend with a config class of your own.",
    )


@rule("hunyuan-top-k-list", ERROR, (LLAMA_CPP,), needs=("config",))
def hunyuan_top_k_list(facts: DeployFacts, serving: Serving) -> Problem | None:
    """llama.cpp's converter reads Hunyuan's moe_topk as a list of equal numbers, one a layer.

    Source: llama.cpp conversion/hunyuan.py:85-87.
    """
    assert facts.config is not None
    held = facts.config.get("moe_topk")
    if facts.model_type != "hunyuan_v1_moe" or (isinstance(held, list) and len(set(held)) == 1):
        return None
    return Problem(
        f"moe_topk is {held!r}: llama.cpp's converter takes a list with the same number for every layer only.",
        f"Write it as [{facts.top_k}, {facts.top_k}, ...], one number a layer.",
    )


@rule("same-count-in-every-layer", ERROR, ENGINES, needs=("config",))
def same_count_in_every_layer(facts: DeployFacts, serving: Serving) -> Problem | None:
    """Every layer has the same number of experts.

    Source: llama.cpp src/llama-model.cpp:1331 reads one number; no language model of transformers 5.23 builds its
    experts from per_layer_config; of vLLM's models only nemotron_h does (vllm models/nemotron_h.py:296).
    """
    assert facts.config is not None
    lists = [name for name in NUM_EXPERTS if isinstance(facts.config.get(name), list)]
    layers = facts.config.get("per_layer_config")
    varying = isinstance(layers, dict | list) and any(
        isinstance(layer, dict) and layer.keys() & set(NUM_EXPERTS)
        for layer in (layers.values() if isinstance(layers, dict) else layers)
    )
    # The towers of ERNIE-4.5-VL are no layers, and a list of equal numbers is read as one.
    if not varying and all(len(set(facts.config[name])) == 1 for name in lists):
        return None
    return Problem(
        "the number of experts differs between layers: all layers are built with one number.",
        "Keep the same number of experts in every layer.",
    )


@rule("names-agree", ERROR, ENGINES, needs=("config",))
def names_agree(facts: DeployFacts, serving: Serving) -> Problem | None:
    """All names of one count in config.json hold the same number, because every reader has its own favourite.

    Source: llama.cpp conversion/base.py:1517 takes num_local_experts before num_experts; transformers takes the name of
    its config class; vllm models/qwen3_moe.py:150 and sglang srt/models/qwen3_moe.py:266 read num_experts.
    """
    assert facts.config is not None
    for names in (NUM_EXPERTS, TOP_K, N_GROUP):
        held = {name: facts.config[name] for name in names if isinstance(facts.config.get(name), int)}
        if len(set(held.values())) > 1:
            listed = " and ".join(f"{name} = {value}" for name, value in held.items())
            return Problem(
                f"config.json says {listed}: which one is used depends on the reader.",
                "Set all of them to the number in the tensors; `moeprune export` does.",
            )
    return None


@rule("name-of-transformers-4", WARNING, (VLLM, SGLANG, TRANSFORMERS), needs=("config",))
def name_of_transformers_4(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The number of experts is in config.json also under the name that transformers 4 reads.

    Source: transformers 5.23 writes Qwen3-MoE's as num_local_experts alone (configuration_qwen3_moe.py:51);
    transformers 4.57.1 then assumes 128. vLLM 0.32.0 and SGLang 0.5.23 need transformers 5, older ones use 4.
    """
    assert facts.config is not None
    name = NAME_OF_TRANSFORMERS_4.get(facts.model_type)
    if name is None or name in facts.config:
        return None
    return Problem(
        f"config.json has no {name}: transformers 4, and any engine on top of it, assumes 128 experts.",
        f'Add "{name}": {facts.num_experts} to config.json; `moeprune export` does.',
    )


@rule("llama-max-experts", ERROR, (LLAMA_CPP,))
def llama_max_experts(facts: DeployFacts, serving: Serving) -> Problem | None:
    """llama.cpp takes at most 1024 experts.

    Source: llama.cpp src/llama-hparams.h:12, src/llama-model.cpp:1361.
    """
    if facts.num_experts <= LLAMA_MAX_EXPERTS:
        return None
    return Problem(
        f"{facts.num_experts} experts a layer: llama.cpp stops above {LLAMA_MAX_EXPERTS}.",
        f"Keep at most {LLAMA_MAX_EXPERTS}.",
    )


@rule("multiple-of-eight", WARNING, SERVERS)
def multiple_of_eight(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The number of experts is a multiple of 8, so that the usual numbers of devices share them evenly.

    Source: sglang srt/eplb/expert_location.py:256 and vllm layers/fused_moe/layer.py:262 divide it by the
    expert-parallel size; vllm layers/fused_moe/experts/trtllm_fp8_moe.py:466 needs a multiple of 4.
    """
    if facts.num_experts % 8 == 0:
        return None
    return Problem(
        f"{facts.num_experts} experts is not a multiple of 8: they cannot be shared evenly by 2, 4 or 8 devices, and "
        "kernels made for multiples of 4 are lost.",
        f"{_multiples(facts)} would do.",
    )


def _multiples(facts: DeployFacts) -> str:
    lower = facts.num_experts // 8 * 8
    return " or ".join(str(n) for n in (lower, lower + 8) if 0 < n <= (facts.most or n)) or "8"
