"""Numbers of experts that an engine serves with a slower kernel, or not at all on some hardware."""

from __future__ import annotations

from moeprune.deploy.facts import DeployFacts
from moeprune.deploy.rule import (
    ERROR,
    LLAMA_CPP,
    SERVERS,
    SGLANG,
    VLLM,
    WARNING,
    Problem,
    is_power_of_two,
    nearest,
    rule,
)
from moeprune.deploy.serving import Serving
from moeprune.deploy.tuned import BLACKWELL, file_stem, has_tuned_file

# Besides the powers of two up to 512.
FUSED_TOP_K = {VLLM: (192, 320, 384, 448, 576), SGLANG: (), LLAMA_CPP: (288, 576)}
# Numbers of routed experts at which SGLang fuses DeepSeek-V3's shared expert into the routed ones.
FUSED_SHARED = {"deepseek_v3": 256, "deepseek_v32": 256}
DTYPE_OF_FILE = {"none": None, "fp8": "fp8_w8a8", "int4": "int4_w4a16", "int8": "int8_w8a16"}
FOLDER = {VLLM: "VLLM_TUNED_CONFIG_FOLDER", SGLANG: "SGLANG_MOE_CONFIG_DIR"}
TUNER = {VLLM: "benchmarks/kernels/benchmark_moe.py", SGLANG: "benchmark/kernels/fused_moe_triton"}


@rule("fused-top-k", WARNING, (VLLM, SGLANG, LLAMA_CPP), needs=("bias", "scoring"))
def fused_top_k(facts: DeployFacts, serving: Serving) -> Problem | None:
    """Softmax and top-k run in one kernel for powers of two up to 512 and a few numbers more.

    Source: vllm csrc/moe/topk_softmax_kernels.cu (commit 0112cf2: 192, 320, 384, 448, 576 on CUDA); sglang
    kernels/ops/moe/moe_topk_softmax.py:90-96; llama.cpp ggml/src/ggml-cuda/topk-moe.cu:407-412 (288, 576 on CUDA).
    """
    if serving.engine != LLAMA_CPP and (facts.n_group > 1 or facts.bias == "correction" or facts.scoring != "softmax"):
        return None
    if facts.n_group > 1:
        return None

    def fits(num_experts: int) -> bool:
        few = is_power_of_two(num_experts) and num_experts <= 512
        return few or num_experts in FUSED_TOP_K[serving.engine]

    if fits(facts.num_experts):
        return None
    fitting = nearest(facts, fits)
    return Problem(
        f"the router's top-k has no fused kernel for {facts.num_experts} experts: it takes several, which is slower at "
        "small batches.",
        f"{f'{fitting} experts have one. ' if fitting else ''}Seldom worth other experts: compare the router's time "
        "first.",
    )


@rule("fused-shared-expert", WARNING, (SGLANG,), needs=("shared_experts",))
def fused_shared_expert(facts: DeployFacts, serving: Serving) -> Problem | None:
    """SGLang computes DeepSeek-V3's shared expert together with the routed ones at 256 of them only.

    Source: sglang srt/models/deepseek_v2.py:3357-3374 ("Config does not support fused shared expert(s)"); with expert
    parallelism it does not either way (line 3385).
    """
    at = FUSED_SHARED.get(facts.model_type) if serving.ep == 1 else None
    if at is None or facts.shared_experts != 1 or facts.num_experts == at or (facts.most or at) != at:
        return None
    return Problem(
        f"SGLang fuses the shared expert of {facts.model_type} at {at} routed experts only: at {facts.num_experts} it "
        "runs by itself, which eats some of the gain.",
        "Start the original with --disable-shared-experts-fusion when you compare the two.",
    )


@rule("tuned-file", WARNING, SERVERS, needs=("gpu", "expert_width", "quantisation"))
def tuned_file(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The engine ships a tuned configuration of its Triton kernel for this number and width of experts on this GPU.

    Source: vllm layers/fused_moe/fused_moe.py:1093-1163 and configs/; sglang
    srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_config.py:36-110 and configs/.
    """
    assert serving.gpu is not None and facts.expert_width is not None and facts.quantisation is not None
    kind = facts.quantisation.kind
    if kind not in DTYPE_OF_FILE or (kind == "int4" and not serving.gpu.startswith("mi")):
        return None  # served by other kernels: 4-bit experts by Marlin wherever that runs
    shape = {
        "width": facts.expert_width // serving.width_shards,
        "dtype": DTYPE_OF_FILE[kind],
        "block": facts.quantisation.block,
    }

    def fits(num_experts: int) -> bool:
        if 2 * num_experts < facts.num_experts:
            return False  # too far to be advised
        held, rest = divmod(num_experts + serving.redundant, serving.ep)
        return not rest and has_tuned_file(serving.engine, serving.gpu or "", num_experts=held, **shape)

    if fits(facts.num_experts):
        return None
    held = (facts.num_experts + serving.redundant) // serving.ep
    stem = file_stem(num_experts=held, **shape)
    others = nearest(facts, fits)
    return Problem(
        f"{serving.engine} has no tuned kernel configuration for {stem} on {serving.gpu}: its Triton kernel runs with "
        "defaults.",
        f"Tune it ({TUNER[serving.engine]}) and put the file where {FOLDER[serving.engine]} points"
        f"{f'; {others} experts have one' if others else ''}.",
    )


@rule("aligned-experts", WARNING, (VLLM,))
def aligned_experts(facts: DeployFacts, serving: Serving) -> Problem | None:
    """The Triton kernel of vLLM takes fewer than 1024 experts, counted in steps of 32.

    Source: vllm layers/fused_moe/experts/triton_moe.py:85-91.
    """
    if -(-facts.num_experts // 32) * 32 < 1024:
        return None
    return Problem(
        f"{facts.num_experts} experts are too many for vLLM's Triton kernel, another one is used.", "Keep at most 992."
    )


@rule("blackwell-fp8", ERROR, (VLLM,), needs=("gpu", "quantisation", "top_k"))
def blackwell_fp8(facts: DeployFacts, serving: Serving) -> Problem | None:
    """FlashInfer's FP8 block kernel on Blackwell takes multiples of 4, up to 512 experts and top-32.

    Source: vllm layers/fused_moe/experts/trtllm_fp8_moe.py:465-483 (asserted at the first token).
    """
    assert facts.top_k is not None and facts.quantisation is not None
    if serving.gpu not in BLACKWELL or facts.quantisation.kind != "fp8" or facts.quantisation.block is None:
        return None
    if facts.num_experts % 4 == 0 and facts.num_experts <= 512 and facts.top_k <= 32:
        return None
    fitting = nearest(facts, lambda n: n % 4 == 0 and n <= 512)
    return Problem(
        f"{facts.num_experts} experts, top-{facts.top_k}, stored in FP8 blocks: vLLM's FlashInfer kernel for Blackwell "
        "asserts a multiple of 4, at most 512, and at most top-32.",
        f"{f'Keep {fitting}, or choose' if fitting else 'Choose'} another FP8 backend.",
    )
