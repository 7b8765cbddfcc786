"""What one model scored, item by item, as a file that can be kept and paired later."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from moeprune.errors import EvaluationError
from moeprune.files import write_text


class Score(BaseModel):
    """One number with its uncertainty."""

    model_config = ConfigDict(extra="forbid")

    metric: str
    value: FiniteFloat
    stderr: FiniteFloat | None = Field(description="Standard error over items; None for fewer than two items.")
    n: Annotated[int, Field(ge=1)] = Field(description="Number of items.")
    higher_is_better: bool

    def summary(self) -> dict:
        """The fields of a report: metric, value, stderr, n and higher_is_better."""
        return self.model_dump(include={"metric", "value", "stderr", "n", "higher_is_better"})


class TaskResult(Score):
    """One task's score and the per-item values that a paired comparison needs."""

    version: str = Field(description="The version that the task states in its metadata.")
    num_fewshot: int
    fingerprint: str = Field(description="SHA-256 of the items' documents, prompts and targets, in order.")
    doc_ids: list[int] = Field(description="Position of each item in the task's split, ascending.")
    values: list[FiniteFloat] = Field(description="One for each item: the metric, or the bits of the document.")
    bytes: list[int] | None = Field(description="Bytes of each document for bits_per_byte, otherwise None.")

    @model_validator(mode="after")
    def _lengths_agree(self) -> TaskResult:
        lengths = {self.n, len(self.doc_ids), len(self.values)} | (
            {len(self.bytes)} if self.bytes is not None else set()
        )
        if len(lengths) != 1:
            raise ValueError(f"n, doc_ids, values and bytes differ in length: {sorted(lengths)}")
        return self


class GroupResult(Score):
    """The score over all items of several tasks together."""

    tasks: list[str]

    def summary(self) -> dict:
        """The fields of a report, with the names of the tasks."""
        return super().summary() | {"tasks": list(self.tasks)}


class ModelResult(BaseModel):
    """All that one model scored in one evaluation."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    name: str
    tasks: dict[str, TaskResult]
    groups: dict[str, GroupResult]
    limit: int | None = Field(description="At most this many items a task, the first ones; None for all.")
    seed: int
    batch_size: int
    apply_chat_template: bool
    lm_eval_version: str
    seconds: float = Field(description="Wall-clock time, from loading the tasks to the last score.")

    def summary(self) -> dict[str, dict]:
        """What the report shows: ``{"results": {task: ...}, "groups": {group: ...}}``, without the per-item values."""
        return {
            "results": {name: result.summary() for name, result in self.tasks.items()},
            "groups": {name: result.summary() for name, result in self.groups.items()},
        }

    def to_json(self) -> str:
        """The whole result as JSON text, floats written so that they read back equal."""
        return self.model_dump_json(indent=None)

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "the given text") -> ModelResult:
        """Reads what :meth:`to_json` wrote.

        Args:
            text: JSON.
            source: Where the text is from, for the error message.

        Raises:
            EvaluationError: The text is damaged, or was written by another version of moeprune.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "top level"
            raise EvaluationError(
                f"{source} is not an evaluation result of this version of moeprune (at {place}: {first['msg']}). "
                "Delete it and evaluate again."
            ) from error

    def save(self, path: Path) -> None:
        """Writes the result to ``path``: first to a temporary name, then renamed, so that a file there is complete."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> ModelResult:
        """Reads what :meth:`save` wrote.

        Raises:
            EvaluationError: There is no such file, it is damaged, or another version of moeprune wrote it.
        """
        try:
            text = path.read_bytes()
        except FileNotFoundError as error:
            raise EvaluationError(f"There is no evaluation result at {path}. Evaluate the model first.") from error
        return cls.from_json(text, source=str(path))
