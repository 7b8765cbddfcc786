"""What a pruned checkpoint computes, beside its source with the plan applied: the models that transformers builds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeprune.anatomy.source import Source
from moeprune.calibrate.streaming.memory import fits
from moeprune.checkpoint.load import load_model
from moeprune.errors import CheckpointError, RoomError, UnsupportedModelError
from moeprune.plan.plan import Plan
from moeprune.verified import Check

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROBE_LENGTHS = (17, 48)
PROMPT_TOKENS = 8
NEW_TOKENS = 8
RELOAD = "strict reload"
LOGITS = "logits equal to the plan applied in memory"


@dataclass(frozen=True)
class Outputs:
    """Logits of :func:`probes`, each (rows, tokens, vocabulary), and how many tokens were generated, if any were."""

    logits: list[Tensor]
    generated: int | None = None


def no_room(pruned: Source, source: Source | None, *, device: str) -> str | None:
    """Why the models cannot be loaded as a whole, one after the other; None if they can."""
    room, why = fits(source or pruned, device=device)  # the source is the larger one
    return None if room else why


def probes(pruned: Source) -> list[Tensor]:
    """Random token ids, (2, tokens) int64."""
    import torch

    embedding: Any = pruned.anatomy.skeleton.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (2, length), generator=generator) for length in PROBE_LENGTHS]


def run_whole(model: PreTrainedModel, batches: Sequence[Tensor]) -> Outputs:
    """What a model in memory says."""
    generate: Any = model.generate
    prompt = batches[-1][:1, :PROMPT_TOKENS].to(model.device)
    written = generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return Outputs([_logits(model, ids) for ids in batches], written.shape[1] - PROMPT_TOKENS)


def check_whole(outputs: Outputs, source: Source | None, *, plan: Plan, device: str) -> list[Check]:
    """Compare them with the source in memory, pruned there."""
    from moeprune.apply.memory import apply_plan

    checks = _check_finite(outputs)
    if source is not None:
        original = load_model(source.path, device=device)
        in_memory = apply_plan(original, plan=plan, anatomy=source.anatomy)
        checks.append(_compare(outputs, [_logits(in_memory, ids) for ids in probes(source)]))
    checks.append(Check("generation", bool(outputs.generated), f"{outputs.generated} tokens"))
    return checks


def check_streamed(pruned: Source, source: Source | None, *, plan: Plan, device: str, why: str) -> list[Check]:
    """The same layer by layer, for models without room; tokens are not generated."""
    from moeprune.calibrate.streaming.logits import stream_logits

    batches = [{"input_ids": ids} for ids in probes(pruned)]
    try:
        outputs = Outputs(stream_logits(pruned, batches=batches, device=device))
        checks = [Check(RELOAD, True, f"layer by layer: {why}"), *_check_finite(outputs)]
        if source is not None:
            checks.append(_compare(outputs, stream_logits(source, batches=batches, plan=plan, device=device)))
    except CheckpointError as error:
        return [Check(RELOAD, False, str(error))]
    except (RoomError, UnsupportedModelError) as error:
        return [Check(RELOAD, True, f"not made, nor are logits compared: {error}")]
    return checks


def _check_finite(outputs: Outputs) -> list[Check]:
    if all(bool(logits.isfinite().all()) for logits in outputs.logits):
        return []
    return [Check("finite logits", False, "the pruned model gives NaN or infinity")]


def _compare(outputs: Outputs, expected: Sequence[Tensor]) -> Check:
    pairs = zip(outputs.logits, expected, strict=True)
    worst = max(float((one.float() - other.float()).abs().max()) for one, other in pairs)
    tokens = sum(logits.shape[0] * logits.shape[1] for logits in outputs.logits)
    return Check(LOGITS, worst == 0, f"largest difference {worst:g} over {tokens} tokens")


def _logits(model: Any, ids: Tensor) -> Tensor:
    import torch

    with torch.inference_mode():
        return model(input_ids=ids.to(model.device), use_cache=False).logits
