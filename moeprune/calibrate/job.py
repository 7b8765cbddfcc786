"""A calibration run from settings to a statistics file: which text, in which way, gone on from where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune import __version__
from moeprune.anatomy.source import Source
from moeprune.calibrate.calibrate import calibrate, choose_rows, read_calibration, record
from moeprune.calibrate.generate import answers_as_data, check_prompts, generate_answers
from moeprune.calibrate.prompts import Prompt, read_prompts
from moeprune.calibrate.quantities import cost_of
from moeprune.calibrate.ranks import Ranks
from moeprune.calibrate.resume import Partial, partial_folder
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.sample import SAMPLED_TOKENS
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.until import Until
from moeprune.checkpoint.classes import transformers_config
from moeprune.checkpoint.load import load_model, load_tokenizer
from moeprune.data_mix import expand_data
from moeprune.data_spec import DataSpec
from moeprune.errors import DataError, MoePruneError, RoomError
from moeprune.files import why_not_writable
from moeprune.recipe import Calibration

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class How:
    """What does not belong to a recipe: it changes where and when things are computed, not what.

    Attributes:
        dtype: In which the model runs.
        device_map: How a model is spread over the GPUs of this process, if it is.
        stream: Layer by layer or as a whole; None leaves it to the memory there is.
        offload_hidden: Folder for hidden states when the model runs layer by layer.
        keep_inputs: File for the layer inputs of the sampled tokens.
        save_every: Minutes between two saves of unfinished sums.
        cache: Keep tokenised text, and use what was kept.
        quiet: No progress bar.
    """

    dtype: str = "auto"
    device_map: str | None = None
    stream: bool | None = None
    offload_hidden: Path | None = None
    keep_inputs: Path | None = None
    save_every: float = 10.0
    quiet: bool = False
    cache: bool = True


class Job:
    """One calibration run.

    Args:
        source: The model.
        out: The statistics file. Unfinished sums and the model's own answers are kept beside it.
        settings: The text and what is summed.
        how: Where and when.
        ranks: This process among those that share the text.
        load: Gives the model in memory; by default it is loaded.
        say: Receives one line for each thing that was decided without being asked for.

    Raises:
        MoePruneError: If options contradict each other, or transformers cannot run the model as it is stored.
    """

    def __init__(
        self,
        source: Source,
        *,
        out: Path,
        settings: Calibration,
        how: How,
        ranks: Ranks,
        load: Callable[[], PreTrainedModel] | None = None,
        say: Callable[[str], object] = lambda line: None,
    ):
        self.source, self.out, self.settings, self.how, self.ranks = source, out, settings, how, ranks
        self._load = load or self._loaded
        self._say = say if ranks.is_first else lambda line: None
        _check(settings, how, ranks)
        source.check_runs()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in memory."""
        return self._load()

    @cached_property
    def rows(self) -> list[Rows]:
        """The text: read, tokenised and packed by rank 0, after the model has answered prompts if it is to.

        What can be refused is refused before the model is loaded, and answers are written last.
        """
        rows, prompts = self._given
        if prompts:
            path = self._answer(prompts)
            rows = rows + self._read(self.ranks.once(lambda: answers_as_data(path)))
        if sum(map(len, rows)) == 1:
            self._say("There is one row of text only: no halves of it can be compared to say whether it is enough.")
        if self.settings.packing == "auto" and rows[0].packing == "pad":
            self._say(f"{self.source.name} does not keep the documents of a row apart: each has a row of its own.")
        return rows

    @cached_property
    def _given(self) -> tuple[list[Rows], list[Prompt]]:
        """The text that there is before the model runs, and what the model is to answer."""
        settings = self.settings
        prompts = self._prompts() if settings.self_generate else []
        rows = self._read(settings.data) if settings.data else []
        for spec, part in zip(expand_data(settings.data, tokens=settings.tokens), rows, strict=True):
            if spec.tokens is not None and part.num_tokens < spec.tokens and spec.documents is None:
                self._say(f"{part.domain}: the text ends after {part.num_tokens:,} of {spec.tokens:,} tokens.")
        self.ranks.once(lambda: _check_names(rows, prompts))
        return rows, prompts

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.source.path)

    def _read(self, data: Sequence[DataSpec]) -> list[Rows]:
        settings = self.settings
        return self.ranks.once(
            lambda: read_calibration(
                self.source, tokenizer=self._tokenizer, data=data, tokens=settings.tokens, length=settings.length,
                seed=settings.seed, packing=settings.packing, cache=self.how.cache,
            )
        )  # fmt: skip

    def _prompts(self) -> list[Prompt]:
        """What the model is to answer, read and checked by rank 0."""
        settings = self.settings
        if self.streamed[0]:
            raise RoomError(
                f"--self-generate needs the whole model in memory, to write one token after the other "
                f"({self.streamed[1]}). Have the answers written elsewhere and give them with --data."
            )

        def read() -> list[Prompt]:
            choose_rows(self.source, length=settings.length, packing=settings.packing)
            prompts = read_prompts(settings.self_generate, tokenizer=self._tokenizer, seed=settings.seed)
            config = transformers_config(self.source.path)
            check_prompts(prompts, config=config, max_new_tokens=settings.max_new_tokens)
            return prompts

        return self.ranks.once(read)

    def _answer(self, prompts: Sequence[Prompt]) -> Path:
        """The file with the model's answers."""
        settings = self.settings
        return generate_answers(
            self.model, self._tokenizer, prompts, out=self.out.with_name(f"{self.out.name}.answers.jsonl"),
            max_new_tokens=settings.max_new_tokens, seed=settings.seed, batch_size=settings.batch_size,
            name=self.source.facts.fingerprint, ranks=self.ranks, quiet=self.how.quiet,
        )  # fmt: skip

    @cached_property
    def streamed(self) -> tuple[bool, str]:
        """Whether the model runs layer by layer, and why."""
        from moeprune.calibrate.streaming.memory import fits

        how = self.how
        if how.device_map is not None:
            return False, f"the model is spread over the GPUs (--device-map {how.device_map})"
        if how.stream is not None:
            return how.stream, "as asked for"
        sharing = self.ranks.here if self.ranks.device == "cpu" else 1
        fit, why = fits(self.source, device=self.ranks.device, dtype=how.dtype, sharing=sharing)
        return not all(self.ranks.gather(fit)), why

    def describe(self) -> dict[str, Any]:
        """What :meth:`run` would do, as plain JSON. Reads the text, and nothing of the model but its headers.

        Raises:
            MoePruneError: If the text or the prompts cannot be read.
        """
        settings = self.settings
        streamed, why = self.streamed
        hidden = int(self.source.anatomy.text_config.hidden_size)
        rows, prompts = self._given
        rows = rows if prompts else self.rows
        tokens = {part.domain: part.num_tokens for part in rows}
        answers: dict[str, dict[str, int]] = {}
        for prompt in prompts:
            to_come = answers.setdefault(prompt.domain, {"prompts": 0, "most_tokens": 0})
            to_come["prompts"] += 1
            to_come["most_tokens"] += len(prompt.ids) + settings.max_new_tokens
        most = sum(tokens.values()) + sum(part["most_tokens"] for part in answers.values())
        cost = cost_of(
            settings.statistics, self.source.facts, hidden=hidden, domains=len(tokens) + len(answers),
            sampled=min(SAMPLED_TOKENS, most), reservoir=self.how.keep_inputs is not None,
        )  # fmt: skip
        return {
            "model": self.source.name,
            "tokens": tokens,
            "rows": {part.domain: len(part) for part in rows},
            "answers": answers,
            "length": settings.length,
            "packing": self.ranks.once(
                lambda: choose_rows(self.source, length=settings.length, packing=settings.packing)
            ),
            "ranks": self.ranks.world,
            "device": self.how.device_map or self.ranks.device,
            "pass": "layer by layer" if streamed else "whole model",
            "why": why,
            "statistics": settings.statistics,
            **cost,
        }

    def run(self) -> Stats:
        """Run the text, or what is left of it, and write the statistics.

        Returns:
            The statistics of the whole text on rank 0; on other ranks those of their own part.

        Raises:
            MoePruneError: Whatever text, model or memory do not allow.
            Interrupted: At SIGINT or SIGTERM.
        """
        if self.ranks.is_first:
            _check_writable(self.out)
        streamed, why = self.streamed
        if streamed and self.settings.until_stable is not None:
            raise MoePruneError(
                "--until-stable looks at the sums of all layers now and then; a run layer by layer has them at its end "
                f"only ({why}). Leave it out: run a part of the text with a smaller --tokens, see what `moeprune stats "
                "show` says of its reliability, and run more if that is too low. Or run the whole model, where it fits "
                "(--no-stream, --device-map auto)."
            )
        partial = self._partial()
        stats = self._streamed(partial, why) if streamed else self._whole(partial)
        if self.ranks.is_first:
            _write(stats, self.out)
        self.ranks.wait()
        partial.remove()
        return stats

    def _whole(self, partial: Partial) -> Stats:
        settings = self.settings
        until = Until(settings.until_stable, settings.stable_score) if settings.until_stable is not None else None
        return calibrate(
            self.source, model=self.model, rows=self.rows, batch_size=settings.batch_size, seed=settings.seed,
            quiet=self.how.quiet, statistics=settings.statistics, keep_inputs=self.how.keep_inputs, ranks=self.ranks,
            partial=partial, until=until,
        )  # fmt: skip

    def _streamed(self, partial: Partial, why: str) -> Stats:
        from moeprune.calibrate.streaming.passes import stream_stats

        if self.how.stream is None:
            self._say(f"The model runs layer by layer: {why}.")
        how, settings = self.how, self.settings
        return stream_stats(
            self.source, rows=self.rows, batch_size=settings.batch_size, dtype=how.dtype, device=self.ranks.device,
            quiet=how.quiet, statistics=settings.statistics, keep_inputs=how.keep_inputs, ranks=self.ranks,
            partial=partial, offload_hidden=how.offload_hidden,
            run=record(self.rows, seed=settings.seed, dtype=how.dtype, device=self.ranks.device),
        )  # fmt: skip

    def _loaded(self) -> PreTrainedModel:
        device = "auto" if self.how.device_map is not None else self.ranks.device
        return load_model(self.source.path, dtype=self.how.dtype, device=device, device_map=self.how.device_map)

    def _partial(self) -> Partial:
        settings, ranks = self.settings, self.ranks
        inputs = {
            "model": self.source.facts.fingerprint,
            "text": [[part.domain, part.sha256()] for part in self.rows],
            "batch_size": settings.batch_size,
            "statistics": settings.statistics,
            "keep_inputs": str(self.how.keep_inputs),
            "until_stable": [settings.until_stable, settings.stable_score],
            "dtype": self.how.dtype,
            "device": self.how.device_map or ranks.device.partition(":")[0],
            "versions": {"moeprune": __version__} | {name: version(name) for name in ("torch", "transformers")},
        }
        return Partial(
            partial_folder(self.out), inputs, rank=ranks.rank, world=ranks.world, every=60 * self.how.save_every,
            say=self._say,
        )  # fmt: skip


def _check_writable(out: Path) -> None:
    """Refuse, before anything is run, a place that nothing can be written to."""
    if why := why_not_writable(out):
        raise MoePruneError(f"{out}: cannot be written there ({why}). Give another place with --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise MoePruneError(f"{out}: is a folder; the statistics are a file. Give another name with --out.")


def _write(stats: Stats, out: Path) -> None:
    try:
        stats.save(out)
    except OSError as error:
        raise RoomError(
            f"{out}: the statistics cannot be written ({error.strerror or error}). Make room there and give the same "
            f"command again: it goes on from what {partial_folder(out)} holds."
        ) from error


def _check_names(rows: Sequence[Rows], prompts: Sequence[Prompt]) -> None:
    both = {part.domain for part in rows} & {prompt.domain for prompt in prompts}
    if both:
        raise DataError(
            f"text and prompts are both named {min(both)!r}. Give them names: --data NAME=SOURCE, "
            "--self-generate NAME=SOURCE."
        )


def _check(settings: Calibration, how: How, ranks: Ranks) -> None:
    if how.stream is False and how.offload_hidden is not None:
        raise MoePruneError("--offload-hidden is for a run layer by layer. Leave it or --no-stream out.")
    if how.device_map is not None and how.stream:
        raise MoePruneError("--device-map holds the whole model, --stream does not. Give one of them.")
    if how.device_map is not None and ranks.here > 1:
        raise MoePruneError(
            f"--device-map {how.device_map} gives all GPUs of a machine to one process, but {ranks.here} ranks run "
            "here. Start one rank a machine, or leave it out."
        )
    if how.keep_inputs is not None and settings.statistics != "full":
        raise MoePruneError("--keep-inputs keeps the inputs of the sampled tokens. It needs --stats full.")
