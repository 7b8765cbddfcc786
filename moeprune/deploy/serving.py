"""How a model is to be served."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moeprune.deploy.tuned import GPUS
from moeprune.errors import DeployError, did_you_mean

# The versions whose source the rules were read in.
VERSIONS = {
    "vllm": "0.32.0",
    "sglang": "0.5.23",
    "llama.cpp": "0c1e570 (ggml 0.25.3)",
    "transformers": "5.23.0",
}
ENGINES = tuple(VERSIONS)


@dataclass(frozen=True)
class Serving:
    """An engine and how it spreads the model.

    Attributes:
        engine: One of :data:`ENGINES`.
        tp: Tensor-parallel size.
        ep: Expert-parallel size; 1 means that every device holds a slice of each expert. For vLLM, which has no option
            for it, that is tensor-parallel times data-parallel size under ``--enable-expert-parallel``.
        redundant: Copies of experts on top of the model's own (vLLM's EPLB, SGLang's ``--ep-num-redundant-experts``).
        gpu: One of :data:`moeprune.deploy.tuned.GPUS` in lower or upper case, or None if not known.
    """

    engine: str
    tp: int = 1
    ep: int = 1
    redundant: int = 0
    gpu: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "gpu", self.gpu and self.gpu.lower())
        if self.engine not in VERSIONS:
            raise DeployError(f"unknown engine {self.engine!r}. {did_you_mean(self.engine, ENGINES)}")
        if self.gpu is not None and self.gpu not in GPUS:
            raise DeployError(f"unknown --gpu {self.gpu!r}. {did_you_mean(self.gpu, GPUS)}")
        for option, value, least in (("tp", self.tp, 1), ("ep", self.ep, 1), ("redundant", self.redundant, 0)):
            if value < least:
                raise DeployError(f"--{option} {value}: expected a whole number from {least}.")

    @property
    def width_shards(self) -> int:
        """Into how many slices each expert is cut.

        With expert parallelism vLLM keeps experts whole, and SGLang cuts them ``tp / ep`` times (sglang 0.5.23
        srt/runtime_context.py:154).
        """
        if self.ep == 1:
            return self.tp
        return max(1, self.tp // self.ep) if self.engine == "sglang" else 1


def servings(
    engines: Iterable[str] | None = None, *, tp: int = 1, ep: int = 1, redundant: int = 0, gpu: str | None = None
) -> tuple[Serving, ...]:
    """The same spread on several engines, by default on all.

    Raises:
        DeployError: If an engine or a GPU is unknown, or a number is out of range.
    """
    return tuple(
        Serving(engine, tp=tp, ep=ep, redundant=redundant, gpu=gpu) for engine in dict.fromkeys(engines or ENGINES)
    )
