"""config.json of well-known models, one file a model, and what their makers publish about their sizes.

Each file holds the keys and values of the model's config.json on the Hub, odd ones included, in the order of the Hub.
``seen`` in :data:`MODELS` says how much of it could be compared with a copy of the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_FLOOR, ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, Literal

from moeprune.files import read_json

FOLDER = Path(__file__).parent
INPUT = ("embeddings",)
TABLES = ("embeddings", "output head")


@dataclass(frozen=True)
class Figure:
    """A number of parameters as its publisher writes it.

    Attributes:
        of: All parameters, or those that one token of text uses.
        billions: The published digits; text, because their number says how precise the figure is.
        source: Where it is published.
        without: Parts of :data:`moeprune.anatomy.sizes.PARTS` that the publisher does not count.
        digits: How the figure is to be read: ``exact`` to 1 %; ``rounded`` where the digits are too few for that;
            ``cut`` where the digits that follow were dropped without rounding. No other allowance is made.
    """

    of: Literal["total", "active"]
    billions: str
    source: str
    without: tuple[str, ...] = ()
    digits: Literal["exact", "rounded", "cut"] = "exact"

    def agrees(self, number: int, *, digits: str | None = None) -> bool:
        """Whether a number of parameters is what was published."""
        published, counted = Decimal(self.billions), Decimal(number) / 10**9
        if (digits or self.digits) == "exact":
            return abs(counted / published - 1) <= Decimal("0.01")
        rounding = ROUND_FLOOR if (digits or self.digits) == "cut" else ROUND_HALF_UP
        last_digit = Decimal(1).scaleb(int(published.as_tuple().exponent))
        return counted.quantize(last_digit, rounding) == published


def total(billions: str, source: str, **how: Any) -> Figure:
    """All parameters."""
    return Figure("total", billions, source, **how)


def active(billions: str, source: str, **how: Any) -> Figure:
    """Parameters that one token uses."""
    return Figure("active", billions, source, **how)


@dataclass(frozen=True)
class Published:
    """One model.

    Attributes:
        hub: Where its config.json is.
        figures: What its makers say of its size.
        seen: How much of the file was compared with a copy of the original; ``all`` of it, or what else.
    """

    hub: str
    figures: tuple[Figure, ...]
    seen: str = "all"


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a model of :data:`MODELS`."""
    return read_json(FOLDER / f"{name}.json")


CARD = "model card"
DEEPSEEK_V3 = "arXiv:2412.19437; without the multi-token prediction layer, which comes on top"
# DeepSeek's README_WEIGHTS.md says that both tables are in its 36.7; the shapes give 37.6 with both, 36.6 with one.
DEEPSEEK_WEIGHTS = "deepseek-ai/DeepSeek-V3 README_WEIGHTS.md"
# Its footnote: the multi-token prediction layer is counted, word embeddings and output layer are not. The first is 4
# billion of GLM-4.5's 355 and not in the transformers model, the others are 1.6; the totals agree to 1 % all the same.
GLM = "arXiv:2508.06471, table 1"
GPT_OSS = "arXiv:2508.10925, table 1: the active count includes unembedding, not embedding"
LLAMA4 = "model card; the total includes the vision tower, the active count is that of a token of text"

MODELS: dict[str, Published] = {
    "Mixtral-8x7B-v0.1": Published(
        "mistralai/Mixtral-8x7B-v0.1",
        (total("46.7", "mistral.ai/news/mixtral-of-experts"), active("12.9", "mistral.ai/news/mixtral-of-experts")),
    ),
    "Mixtral-8x22B-v0.1": Published(
        "mistralai/Mixtral-8x22B-v0.1",
        (total("141", "mistral.ai/news/mixtral-8x22b"), active("39", "mistral.ai/news/mixtral-8x22b")),
    ),
    "Qwen1.5-MoE-A2.7B": Published(
        "Qwen/Qwen1.5-MoE-A2.7B",
        (total("14.3", CARD), active("2.7", CARD)),
        seen="all but initializer_range, output_router_logits, sliding_window, transformers_version, use_cache",
    ),
    "Qwen2-57B-A14B": Published(
        "Qwen/Qwen2-57B-A14B",
        (
            total("57.41", "qwenlm.github.io/blog/qwen2, table of sizes"),
            total("56.32", "qwenlm.github.io/blog/qwen2, non-embedding parameters", without=TABLES),
            active("14", CARD, digits="rounded"),
        ),
    ),
    "Qwen3-30B-A3B": Published(
        "Qwen/Qwen3-30B-A3B",
        (total("30.5", CARD), total("29.9", CARD, without=TABLES), active("3.3", CARD, digits="cut")),
    ),
    "Qwen3-235B-A22B": Published(
        "Qwen/Qwen3-235B-A22B", (total("235", CARD), total("234", CARD, without=TABLES), active("22", CARD))
    ),
    "Qwen3-Coder-480B-A35B": Published(
        "Qwen/Qwen3-Coder-480B-A35B-Instruct", (total("480", CARD), active("35", CARD, digits="rounded"))
    ),
    # The checkpoint holds a multi-token prediction layer too (`mtp.*`), which is in neither figure.
    "Qwen3-Next-80B-A3B": Published(
        "Qwen/Qwen3-Next-80B-A3B-Thinking",
        (total("80", CARD), total("79", CARD, without=TABLES), active("3", CARD, digits="cut")),
    ),
    "OLMoE-1B-7B": Published(
        "allenai/OLMoE-1B-7B-0924",
        (total("6.9", "arXiv:2409.02060"), active("1.3", "arXiv:2409.02060", digits="rounded")),
    ),
    "DeepSeek-V2-Lite": Published(
        "deepseek-ai/DeepSeek-V2-Lite",
        (
            total("15.7", "arXiv:2405.04434, appendix B"),
            active("2.4", "arXiv:2405.04434, appendix B", without=INPUT, digits="cut"),
        ),
        seen="all but transformers_version",
    ),
    "DeepSeek-V2": Published(
        "deepseek-ai/DeepSeek-V2",
        (total("236", "arXiv:2405.04434"), active("21", "arXiv:2405.04434", without=INPUT)),
        seen="all, of DeepSeek-V2.5, which has the same shapes",
    ),
    "DeepSeek-V3": Published(
        "deepseek-ai/DeepSeek-V3",
        (
            total("671", DEEPSEEK_V3),
            active("37", DEEPSEEK_V3, without=INPUT, digits="rounded"),
            active("36.7", DEEPSEEK_WEIGHTS, without=INPUT),
        ),
    ),
    "DeepSeek-R1": Published(
        "deepseek-ai/DeepSeek-R1", (total("671", CARD), active("37", CARD, without=INPUT, digits="rounded"))
    ),
    # The paper's total of 1.04T (arXiv:2507.20534) is 17 billion more than the released weights, which is the size of
    # one more expert layer; the released config says num_nextn_predict_layers = 0.
    "Kimi-K2-Instruct": Published(
        "moonshotai/Kimi-K2-Instruct",
        (total("1e3", "model card: 1T", digits="rounded"), active("32.6", "arXiv:2507.20534, table 2")),
    ),
    "Moonlight-16B-A3B": Published(
        "moonshotai/Moonlight-16B-A3B-Instruct",
        (
            total("16", CARD),
            total("15.29", "arXiv:2502.16982, table 5: without embeddings", without=TABLES),
            active("2.24", "arXiv:2502.16982, table 5: without embeddings", without=TABLES),
        ),
    ),
    "GLM-4.5": Published("zai-org/GLM-4.5", (total("355", GLM), active("32", GLM, without=TABLES))),
    "GLM-4.5-Air": Published(
        "zai-org/GLM-4.5-Air",
        (total("106", GLM), active("12", GLM, without=TABLES, digits="rounded")),
        seen="all, of PrimeIntellect/INTELLECT-3-Base, a copy of it, but eos_token_id",
    ),
    "GLM-4.6": Published(
        "zai-org/GLM-4.6",
        (total("355", "as GLM-4.5"), active("32", "as GLM-4.5", without=TABLES)),
        seen="all, of GLM-4.7, which has the same shapes",
    ),
    "gpt-oss-20b": Published("openai/gpt-oss-20b", (total("20.91", GPT_OSS), active("3.61", GPT_OSS, without=INPUT))),
    "gpt-oss-120b": Published(
        "openai/gpt-oss-120b", (total("116.83", GPT_OSS), active("5.13", GPT_OSS, without=INPUT))
    ),
    "MiniMax-M2": Published(
        "MiniMaxAI/MiniMax-M2",
        (total("230", CARD), active("10", CARD, without=TABLES, digits="rounded")),
        seen="every key, in two pruned or converted copies",
    ),
    "ERNIE-4.5-21B-A3B": Published(
        "baidu/ERNIE-4.5-21B-A3B-PT",
        (total("21", CARD, digits="cut"), active("3", CARD, digits="rounded")),
        seen="what decides its shape; moe_capacity, moe_gate, auto_map and ids from Baidu's own converter",
    ),
    "Llama-4-Scout-17B-16E": Published(
        "meta-llama/Llama-4-Scout-17B-16E-Instruct", (total("109", LLAMA4), active("17", LLAMA4, digits="rounded"))
    ),
    "Llama-4-Maverick-17B-128E-FP8": Published(
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8",
        (total("400", LLAMA4), active("17", LLAMA4, digits="rounded")),
        seen="all but the list of modules that are not quantised, which is left out",
    ),
    "Phi-3.5-MoE": Published("microsoft/Phi-3.5-MoE-instruct", (total("41.9", CARD), active("6.6", CARD))),
    "granite-3.1-1b-a400m-instruct": Published(
        "ibm-granite/granite-3.1-1b-a400m-instruct",
        (total("1.3", CARD, digits="rounded"), active("0.4", CARD, without=INPUT, digits="rounded")),
    ),
    "granite-3.0-3b-a800m-instruct": Published(
        "ibm-granite/granite-3.0-3b-a800m-instruct", (total("3.3", CARD), active("0.8", CARD, without=INPUT))
    ),
    "Hunyuan-A13B": Published(
        "tencent/Hunyuan-A13B-Instruct",
        (total("80", CARD), active("13", CARD, digits="rounded")),
        seen="the keys up to moe_intermediate_size, of a converted copy, and what decides its shape",
    ),
    "dots.llm1": Published(
        "rednote-hilab/dots.llm1.base", (total("142", "arXiv:2506.05767"), active("14", "arXiv:2506.05767"))
    ),
    "LFM2-8B-A1B": Published(
        "LiquidAI/LFM2-8B-A1B",
        (total("8.3", CARD), active("1.5", CARD, digits="cut")),
        seen="all, of a finetuned copy; rope_theta at the top, as before transformers 5",
    ),
    "Jamba-v0.1": Published("ai21labs/Jamba-v0.1", (total("52", CARD), active("12", CARD))),
    "dbrx-instruct": Published(
        "databricks/dbrx-instruct",
        (total("132", CARD), active("36", CARD, digits="rounded")),
        seen="all but transformers_version, in two converted copies",
    ),
}
