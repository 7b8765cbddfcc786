"""A model's own answers as calibration text.

EASY-EP (arXiv 2504.06792, section 5.3.3) counts on questions with the answers of the model that is pruned: better than
right answers by others, far better than text from the web.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from moeprune.calibrate.prompts import Prompt
from moeprune.calibrate.ranks import Ranks
from moeprune.checkpoint.classes import model_class
from moeprune.checkpoint.load import long_texts
from moeprune.data_spec import DataSpec
from moeprune.errors import DataError, UnsupportedModelError
from moeprune.files import sha256_json
from moeprune.interrupts import Interrupted, interruptible

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ALONE = Ranks()


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    out: Path,
    max_new_tokens: int = 1024,
    temperature: float = 0.6,
    seed: int = 0,
    batch_size: int = 8,
    name: str = "",
    ranks: Ranks = ALONE,
    quiet: bool = False,
) -> Path:
    """Answer every prompt, and write the answers in the order of the prompts into a file of JSON lines.

    Ranks answer one batch each, rank 0 appends these answers to the file, and so on; a rank that is done early waits
    for the others. A file that holds some of the answers already is continued, by any number of ranks; a line that was
    cut off is written anew. An answer depends on its prompt, its place and the seed; not on the batch, but for
    rounding. Batches are the same whatever the number of ranks and wherever a run was stopped.

    Args:
        model: The model in memory.
        tokenizer: Its tokenizer.
        prompts: What to answer.
        out: The file. Each line has ``domain``, ``prompt``, ``answer``, and ``input_ids`` of both together.
        max_new_tokens: Longest answer.
        temperature: Of sampling; 0 takes the likeliest token.
        seed: Of sampling.
        batch_size: Prompts at a time.
        name: The model's fingerprint, so that answers of another model are not continued.
        ranks: The processes that share the prompts; all of them call this with the same arguments.
        quiet: No progress bar.

    Returns:
        ``out``.

    Raises:
        DataError: If ``out`` holds answers to other prompts or of other settings, or a prompt leaves no room in the
            model's context.
        UnsupportedModelError: If the model does not generate text from left to right.
        Interrupted: At SIGINT or SIGTERM.
    """
    check_prompts(prompts, config=model.config, max_new_tokens=max_new_tokens)
    settings = {"model": name, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    keys = [sha256_json([settings, at, list(prompt.ids)]) for at, prompt in enumerate(prompts)]
    done = ranks.once(lambda: _continued(out, keys))
    written = done % batch_size if done < len(prompts) else 0  # of the first batch
    bar = tqdm(total=len(prompts), initial=done, unit="answer", desc="generate", disable=quiet or not ranks.is_first)
    with interruptible(), long_texts(tokenizer), bar:
        try:
            for own in _rounds(range(done - written, len(prompts)), batch_size, ranks):
                batch = [prompts[at] for at in own]
                sampler = _Sampler(seed=seed, numbers=own, temperature=temperature)
                answers = _answer(model, tokenizer, batch, sampler, max_new_tokens=max_new_tokens)
                lines = [_line(keys[at], prompts[at], one, tokenizer) for at, one in zip(own, answers, strict=True)]
                new = [line for part in ranks.gather(lines) for line in part][written:]
                if ranks.is_first:
                    _append(out, new)
                done, written = done + len(new), 0
                bar.update(len(new))
        except Interrupted as error:
            error.note = f"{done} of {len(prompts)} answers are in {out}; the same command goes on."
            raise
    return out


def _rounds(numbers: range, batch_size: int, ranks: Ranks) -> Iterator[range]:
    """This rank's batch of each round, one after that of the rank before it; empty where a last round has too few."""
    for begin in range(0, len(numbers), batch_size * ranks.world):
        at = begin + batch_size * ranks.rank
        yield numbers[at : at + batch_size]


def answers_as_data(path: Path) -> tuple[DataSpec, ...]:
    """A file of :func:`generate_answers` as calibration text, whole, one domain for each of its domains."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    return tuple(
        DataSpec(
            source=str(path), domain=domain, ids="input_ids", where={"domain": (domain,)},
            documents=sum(row["domain"] == domain for row in rows),
        )
        for domain in domains
    )  # fmt: skip


class _Sampler(LogitsProcessor):
    """Sampling for each prompt with random numbers of its own: the largest logit plus Gumbel noise is a sample."""

    def __init__(self, *, seed: int, numbers: Iterable[int], temperature: float):
        self._generators = [torch.Generator().manual_seed(seed * 1_000_003 + number) for number in numbers]
        self._temperature = temperature

    def __call__(self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch vocab"]) -> Tensor:
        if self._temperature == 0:
            return scores
        uniform = torch.stack([torch.rand(scores.shape[1], generator=generator) for generator in self._generators])
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return scores.float() / self._temperature + noise.to(scores.device)


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Prompt],
    sampler: _Sampler,
    *,
    max_new_tokens: int,
) -> list[list[int]]:
    """Token ids of each answer, with the token that ended it."""
    if not batch:
        return []
    ends = _ends(model, tokenizer)
    padding = int(str(tokenizer.pad_token_id)) if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    width = max(len(prompt.ids) for prompt in batch)
    ids = torch.full((len(batch), width), padding)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, prompt in enumerate(batch):
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=padding, eos_token_id=ends or None
    )
    generate: Any = model.generate
    with torch.inference_mode():
        written = generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
        )  # fmt: skip
    answers = []
    for row in written[:, width:].tolist():
        end = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:end])
    return answers


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    named = named if named is not None else tokenizer.eos_token_id
    return [] if named is None else [int(token) for token in (named if isinstance(named, list) else [named])]


def check_prompts(prompts: Sequence[Prompt], *, config: PreTrainedConfig, max_new_tokens: int) -> None:
    """Refuse prompts that a model cannot answer, before it is loaded.

    Raises:
        DataError: If there are none, or one leaves no room for an answer in the model's context.
        UnsupportedModelError: If the model does not generate text from left to right.
    """
    if not prompts:
        raise DataError("no prompts to answer.")
    model = model_class(config)
    if config.is_encoder_decoder or not model.can_generate():
        raise UnsupportedModelError(f"{model.__name__} does not continue a text; it cannot answer prompts.")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt.ids) for prompt in prompts)
    if context is not None and longest + max_new_tokens > context:
        raise DataError(
            f"the longest prompt has {longest} tokens; with answers of up to {max_new_tokens} that is beyond the "
            f"context of {context}. Ask for shorter answers (--max-new-tokens) or leave the longest prompts out."
        )


def _continued(out: Path, keys: Sequence[str]) -> int:
    """The number of answers that ``out`` holds; what stands after the last whole line is cut off."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        return 0
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for at, line in enumerate(lines):
        if at >= len(keys) or _key_of(line) != keys[at]:
            raise DataError(
                f"{out}, line {at + 1}: the answer to another prompt, or one of another model, seed, temperature or "
                "length. Give another file, or delete this one."
            )
    if len(whole) < len(data):
        os.truncate(out, len(whole))
    return len(lines)


def _key_of(line: bytes) -> str | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row.get("key") if isinstance(row, dict) else None


def _line(key: str, prompt: Prompt, answer: list[int], tokenizer: PreTrainedTokenizerBase) -> bytes:
    row = {
        "key": key,
        "domain": prompt.domain,
        "prompt": prompt.text,
        "answer": tokenizer.decode(answer),
        "input_ids": [*prompt.ids, *answer],
    }
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _append(out: Path, lines: Sequence[bytes]) -> None:
    """A run that is killed leaves whole lines and at most a part of the last one."""
    with out.open("ab") as file:
        file.write(b"".join(lines))
