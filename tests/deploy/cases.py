"""For each rule a model that breaks it and one, as close as possible, that does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeprune.deploy.facts import DeployFacts
from moeprune.deploy.quantisation import Quantisation
from moeprune.deploy.serving import Serving

FP8 = Quantisation("fp8", "fp8", block=(128, 128))
INT4 = Quantisation("gptq", "int4", group=128)
PLAIN = Quantisation("none", "none")


@dataclass(frozen=True)
class Case:
    """One model on one engine.

    Attributes:
        rule: The rule that decides.
        engine: The engine.
        broken: Facts with which it is broken, on top of :func:`qwen` or, where they name groups, :func:`deepseek`.
        held: The facts of ``broken`` that are changed so that it is not.
        says: A part of the message.
        serving: How the model is spread; options that begin with ``held_`` count for ``held`` only.
    """

    rule: str
    engine: str
    broken: dict[str, Any]
    held: dict[str, Any]
    says: str
    serving: dict[str, Any]

    def build(self, *, held: bool) -> tuple[DeployFacts, Serving]:
        base = deepseek if "n_group" in self.broken else qwen
        plain = {name: value for name, value in self.serving.items() if not name.startswith("held_")}
        changed = {name.removeprefix("held_"): self.serving[name] for name in self.serving.keys() - plain.keys()}
        facts = base(**(self.broken | self.held if held else self.broken))
        return facts, Serving(self.engine, **(plain | changed if held else plain))

    def __str__(self) -> str:
        return f"{self.rule}-{self.engine}"


def qwen(**changes: Any) -> DeployFacts:
    """Qwen3-30B-A3B, with every fact known."""
    config = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "rope_theta": 1e6}
    known: dict[str, Any] = {
        "model_type": "qwen3_moe", "num_experts": 128, "top_k": 8, "n_group": 1, "topk_group": 1,
        "group_score": "top2", "scoring": "softmax", "renormalised": True, "bias": "none", "expert_width": 768,
        "shared_experts": 0, "quantisation": PLAIN, "config": config,
    }  # fmt: skip
    return DeployFacts(**known | changes)


def deepseek(**changes: Any) -> DeployFacts:
    """DeepSeek-V3, with every fact known."""
    config = {
        "model_type": "deepseek_v3", "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_theta": 1e4, "q_lora_rank": 1536,
        "num_hidden_layers": 61,
    }  # fmt: skip
    known: dict[str, Any] = {
        "model_type": "deepseek_v3", "num_experts": 256, "n_group": 8, "topk_group": 4, "scoring": "sigmoid",
        "bias": "correction", "expert_width": 2048, "shared_experts": 1, "quantisation": FP8, "config": config,
    }  # fmt: skip
    return qwen(**known | changes)


def case(rule: str, engine: str, broken: dict[str, Any], held: dict[str, Any], says: str = "", **serving: Any) -> Case:
    return Case(rule, engine, broken, held, says, serving)


def config_of(**keys: Any) -> dict[str, Any]:
    return {"config": qwen().config | keys}


def without(*names: str, base=qwen, **keys: Any) -> dict[str, Any]:
    return {"config": {k: v for k, v in (base().config | keys).items() if k not in names}}


V2 = {"model_type": "deepseek_v2", "bias": "none", "scoring": "softmax", "group_score": "max", "n_group": 8}
LITE = {"model_type": "deepseek_v2", "n_group": 1, "topk_group": 1}
CASES = [
    *(
        case("top-k-fits", engine, {"num_experts": 7}, {"num_experts": 8}, "cannot use 8 of 7 experts")
        for engine in ("vllm", "sglang", "llama.cpp", "transformers")
    ),
    *(
        case("fixed-top-k", engine, {"model_type": "phimoe", "top_k": 1}, {"top_k": 2}, "selects 2 experts, the config")
        for engine in ("vllm", "sglang", "transformers")
    ),
    *(
        case("one-top-k", engine, config_of(num_experts_per_tok=[8, 6]), config_of(), "num_experts_per_tok is a list")
        for engine in ("vllm", "sglang", "transformers")
    ),
    case(
        "hunyuan-top-k-list", "llama.cpp", {"model_type": "hunyuan_v1_moe"} | config_of(moe_topk=6),
        config_of(moe_topk=[6, 6, 6]), "moe_topk is 6",
    ),
    case("same-count-in-every-layer", "vllm", config_of(num_experts=[8, 6]), config_of(num_experts=[8, 8])),
    case(
        "same-count-in-every-layer", "transformers",
        config_of(per_layer_config={"0": {"num_experts": 8}, "1": {"num_experts": 6}}),
        config_of(per_layer_config={"0": {"head_dim": 8}}),
    ),
    *(
        case(
            "names-agree", engine, config_of(num_local_experts=256), config_of(num_local_experts=128),
            "num_experts = 128 and num_local_experts = 256",
        )
        for engine in ("vllm", "sglang", "llama.cpp", "transformers")
    ),
    case("names-agree", "vllm", config_of(experts_per_token=4), config_of(experts_per_token=8), "experts_per_token"),
    case("names-agree", "vllm", config_of(n_group=1, num_expert_group=8), config_of(n_group=8, num_expert_group=8)),
    case(
        "name-of-transformers-4", "transformers", without("num_experts", num_local_experts=48) | {"num_experts": 48},
        config_of(num_local_experts=48, num_experts=48), 'Add "num_experts": 48',
    ),
    case("llama-max-experts", "llama.cpp", {"num_experts": 1025}, {"num_experts": 1024}, "above 1024"),
    case("multiple-of-eight", "vllm", {"num_experts": 45}, {"num_experts": 48}, "40 or 48 would do."),
    case("groups-divide", "vllm", {"n_group": 8, "num_experts": 100}, {"num_experts": 104}, "routes silently without"),
    case("groups-divide", "sglang", {"n_group": 8, "num_experts": 100}, {"n_group": 1}, "Keep 96 or 104"),
    case("groups-divide", "llama.cpp", {"n_group": 8, "num_experts": 100}, {"num_experts": 96}, "aborts while loading"),
    case(
        "groups-divide", "transformers", {"n_group": 8, "num_experts": 100}, {"num_experts": 96},
        "on some token counts runs with scrambled groups",
    ),
    case("group-size", "vllm", {"n_group": 8, "num_experts": 8, "bias": "none"}, {"num_experts": 16}, "silently"),
    case("group-size", "llama.cpp", {"n_group": 8, "num_experts": 8, "bias": "none"}, {"num_experts": 16}),
    case("group-size", "sglang", {"n_group": 8, "num_experts": 8}, {"bias": "none"}, "Keep at least 16"),
    case("group-size", "transformers", {"n_group": 8, "num_experts": 8}, {"group_score": "max"}, "Keep at least 16"),
    *(
        case(
            "groups-reach-top-k", engine, {"n_group": 8, "topk_group": 4, "num_experts": 8}, {"num_experts": 16},
            "hold 4 experts, and its top-k is 8",
        )
        for engine in ("vllm", "sglang", "llama.cpp", "transformers")
    ),
    case("groups-in-use", "llama.cpp", {"n_group": 8, "topk_group": 8}, {"topk_group": 7}, "aborts while loading"),
    case("groups-in-use", "vllm", {"n_group": 8, "topk_group": 9}, {"topk_group": 8}, "the first token fails"),
    *(
        case(
            "groups-by-name", engine, V2 | config_of(topk_method="greedy"),
            config_of(topk_method="group_limited_greedy"), "transformers routes without groups",
        )
        for engine in ("vllm", "sglang", "llama.cpp")
    ),
    case("group-score", "llama.cpp", V2, {"n_group": 1}, "by its best expert, the engine by its two best"),
    case("group-score", "vllm", V2 | {"group_score": "top2"}, {"group_score": "max"}, "by its two best experts"),
    case("group-score", "sglang", V2 | {"group_score": "top2"}, {"bias": "correction"}),
    case("fused-grouped-top-k", "vllm", {"n_group": 64}, {"n_group": 32}, "64 groups and top-8"),
    case("fused-grouped-top-k", "vllm", {"n_group": 8, "top_k": 33}, {"top_k": 32}),
    case("fused-deepseek-router", "sglang", {"n_group": 8, "num_experts": 192}, {"num_experts": 128}, "128 or 256"),
    case("fused-deepseek-router", "sglang", {"n_group": 8, "top_k": 9}, {"top_k": 8}),
    case("fused-deepseek-router", "sglang", {"n_group": 2, "topk_group": 1}, {"n_group": 8}),
    case("fused-top-k", "vllm", {"num_experts": 96}, {"num_experts": 192}, "64 or 128 experts have one"),
    case("fused-top-k", "sglang", {"num_experts": 192}, {"num_experts": 128}, "128 or 256 experts have one"),
    case("fused-top-k", "llama.cpp", {"num_experts": 192}, {"num_experts": 288}),
    case("fused-top-k", "vllm", {"num_experts": 96}, {"scoring": "sigmoid"}),
    case("fused-shared-expert", "sglang", {"n_group": 8, "num_experts": 192}, {"num_experts": 256}, "disable-shared"),
    case("fused-shared-expert", "sglang", {"n_group": 8, "num_experts": 192}, {"shared_experts": 2}),
    case("fused-shared-expert", "sglang", {"n_group": 8, "num_experts": 192}, {}, held_ep=8, held_tp=8),
    case("tuned-file", "vllm", {"num_experts": 96}, {"num_experts": 128}, "E=96,N=384 on h100", gpu="h100", tp=2),
    case("tuned-file", "sglang", {"num_experts": 96}, {"num_experts": 128}, "SGLANG_MOE_CONFIG_DIR", gpu="h100", tp=2),
    case("tuned-file", "vllm", {}, {}, "E=128,N=768 on h100", gpu="h100", held_tp=2),
    case(
        "tuned-file", "vllm", {"num_experts": 96, "expert_width": 1536}, {"num_experts": 128}, "E=48,N=1536",
        gpu="h100", ep=2,
    ),
    case(
        "tuned-file", "sglang", {"quantisation": INT4}, {"quantisation": FP8}, "E=128,N=384,dtype=int4_w4a16",
        gpu="mi300x", tp=2, held_gpu="h100",
    ),
    case("tuned-file", "vllm", {"num_experts": 96}, {"quantisation": INT4}, "on h100", gpu="h100", tp=2),
    case("aligned-experts", "vllm", {"num_experts": 1000}, {"num_experts": 992}, "too many for vLLM's Triton"),
    case(
        "blackwell-fp8", "vllm", {"n_group": 1, "num_experts": 90, "quantisation": FP8}, {"num_experts": 92},
        "Keep 88 or 92", gpu="b200",
    ),
    case("blackwell-fp8", "vllm", {"num_experts": 90, "quantisation": FP8}, {}, gpu="b200", held_gpu="h200"),
    case("blackwell-fp8", "vllm", {"num_experts": 90, "quantisation": FP8}, {"quantisation": PLAIN}, gpu="gb200"),
    case("tp-above-experts", "vllm", {"num_experts": 7}, {"num_experts": 8}, "Use --tp 7 or less", tp=8),
    case("tp-above-experts", "sglang", {"num_experts": 7}, {"num_experts": 8}, tp=8),
    case("tp-above-experts", "vllm", {"num_experts": 7}, {"model_type": "mixtral"}, tp=8),
    case("tp-above-experts", "sglang", {"num_experts": 7}, {"model_type": "mixtral"}, tp=8),
    case("tp-above-experts", "sglang", {"n_group": 1, "topk_group": 1, "num_experts": 12}, {"num_experts": 16}, tp=16),
    case("tp-cuts-experts", "vllm", {"expert_width": 700}, {"expert_width": 704}, "into 8 equal slices", tp=8),
    case("tp-cuts-experts", "sglang", {"expert_width": 700}, {"expert_width": 704}, "Use --tp 7", tp=8),
    case(
        "tp-cuts-experts", "vllm", {"quantisation": FP8}, {"quantisation": PLAIN}, "whole blocks of 128.", tp=4,
    ),
    case("tp-cuts-experts", "vllm", {"quantisation": FP8}, {}, "keeps experts whole", tp=4, held_ep=4),
    case("tp-cuts-experts", "sglang", {"quantisation": FP8}, {}, tp=8, ep=2, held_ep=8),
    case("tp-cuts-groups", "vllm", {"quantisation": INT4}, {"quantisation": PLAIN}, "slices of 192", tp=4),
    case("tp-cuts-groups", "vllm", {"quantisation": INT4}, {}, tp=4, held_tp=2),
    case("ep-even", "sglang", {"num_experts": 100}, {"num_experts": 104}, "--ep-num-redundant-experts 4", ep=8),
    case("ep-even", "sglang", {"num_experts": 100}, {}, "Keep 96 or 104", ep=8, held_redundant=4),
    case(
        "eplb-even", "vllm", {"num_experts": 100}, {}, "num_redundant_experts = 4", ep=8, redundant=2,
        held_redundant=4,
    ),
    case("ep-uneven", "vllm", {"num_experts": 100}, {"num_experts": 104}, "num_redundant_experts = 4", ep=8),
    case("ep-even", "transformers", {"num_experts": 100}, {"num_experts": 104}, "Keep 96 or 104.", ep=8, redundant=4),
    case("ep-even", "sglang", {"most": 128}, {}, "Use --ep 128, or use --ep-num-redundant", ep=256, held_ep=128),
    case("ep-spans-tp", "vllm", {}, {}, "Use --ep 8", tp=8, ep=4, held_ep=16),
    case("ep-spans-tp", "transformers", {}, {}, "Use --ep 8", tp=8, ep=4, held_tp=4),
    case("ep-within-tp", "sglang", {}, {}, "Use --ep 4", tp=8, ep=6, held_ep=4),
    *(
        case(
            "topk-method", engine, {"n_group": 8} | without("topk_method", base=deepseek),
            {"config": deepseek().config}, '"topk_method": "noaux_tc"',
        )
        for engine in ("vllm", "sglang")
    ),
    case(
        "rope-theta", "transformers", without("rope_theta", rope_parameters={"rope_theta": 5e5}),
        config_of(rope_parameters={"rope_theta": 5e5}), 'Add "rope_theta": 500000',
    ),
    case(
        "deepseek-v2-lite-layers", "llama.cpp", LITE | config_of(num_hidden_layers=25), config_of(num_hidden_layers=27),
        "25 layers without q_lora_rank",
    ),
    case(
        "deepseek-v2-lite-layers", "llama.cpp", LITE | config_of(num_hidden_layers=25),
        config_of(num_hidden_layers=25, q_lora_rank=1536),
    ),
    case("try-a-top-k", "vllm", {}, {"top_k": 1}, "--hf-overrides '{\"num_experts_per_tok\": 7}'"),
    case("try-a-top-k", "vllm", {"config": {"moe_topk": 8}}, {"top_k": 1}, '{"moe_topk": 7}'),
    case("try-a-top-k", "sglang", {}, {"top_k": 1}, "--json-model-override-args"),
    case("try-a-top-k", "llama.cpp", {}, {"top_k": 1}, "expert_used_count=int:7"),
    case("old-sglang", "sglang", {"n_group": 8, "num_experts": 192}, {"num_experts": 256}, "0.4.3"),
]  # fmt: skip
