"""What a metric's name says: its kind, its unit and how a number of it is written.

Multiple-choice, generative and loss results are different things and are never averaged with one another.
"""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """What a score measures; the order here is the order in the report."""

    CHOICE = "Multiple choice"
    GENERATION = "Generation"
    LOSS = "Loss on text"
    OTHER = "Other scores"


_LOSSES = {
    "bits_per_byte": "bits per byte",
    "bits_per_token": "bits per token",
    "byte_perplexity": "byte perplexity",
    "word_perplexity": "word perplexity",
    "perplexity": "perplexity",
    "loss": "loss",
}
_CHOICES = {
    "acc": "accuracy",
    "acc_norm": "normalised accuracy",
    "acc_bytes": "byte-normalised accuracy",
    "mc1": "MC1",
    "mc2": "MC2",
}
_GENERATIONS = {
    "exact_match": "exact match",
    "f1": "F1",
    "pass@1": "pass@1",
    "pass_at_1": "pass@1",
    "em": "exact match",
}
_SPELLINGS = {
    "arc": "ARC",
    "bbh": "BBH",
    "boolq": "BoolQ",
    "gpqa": "GPQA",
    "gsm8k": "GSM8K",
    "hellaswag": "HellaSwag",
    "humaneval": "HumanEval",
    "ifeval": "IFEval",
    "mbpp": "MBPP",
    "mmlu": "MMLU",
    "openbookqa": "OpenBookQA",
    "piqa": "PIQA",
    "truthfulqa": "TruthfulQA",
    "winogrande": "WinoGrande",
}
_ABBREVIATIONS = {"bpb", "ppl", "acc"}


def base_name(metric: str) -> str:
    """The metric without the filter that lm-eval appends (``exact_match,strict-match``)."""
    return metric.split(",", 1)[0]


def kind_of(metric: str) -> Kind:
    """Which kind of result a metric is."""
    name = base_name(metric)
    if name in _LOSSES:
        return Kind.LOSS
    if name in _CHOICES:
        return Kind.CHOICE
    if name in _GENERATIONS or name.endswith("_acc"):
        return Kind.GENERATION
    return Kind.OTHER


def metric_label(metric: str) -> str:
    """The metric in words."""
    name = base_name(metric)
    return (_LOSSES | _CHOICES | _GENERATIONS).get(name, name.replace("_", " "))


def is_share(metric: str) -> bool:
    """True for a metric between 0 and 1 that reads better in per cent."""
    return kind_of(metric) in (Kind.CHOICE, Kind.GENERATION)


def score_label(name: str, metric: str) -> str:
    """A group or task with its metric in words: ``offline_bpb`` becomes ``offline bits per byte``."""
    words = name.replace("_", " ").split()
    if words and words[-1] in _ABBREVIATIONS:
        words = words[:-1]
    return " ".join([*(_SPELLINGS.get(word, word) for word in words), metric_label(metric)])


def unit_of(metric: str) -> str:
    """The unit of a value: per cent for shares, the metric itself otherwise."""
    return "%" if is_share(metric) else metric_label(metric)


def scale_of(metric: str) -> float:
    """What a value is multiplied with before it is written or drawn."""
    return 100.0 if is_share(metric) else 1.0


def write_value(value: float, metric: str) -> str:
    """A value of a metric without its unit."""
    return f"{value * scale_of(metric):.{_decimals(value, metric)}f}"


def write_change(value: float, metric: str) -> str:
    """A difference of a metric with its sign and without its unit."""
    text = f"{value * scale_of(metric):+.{_decimals(value, metric)}f}"
    return text.replace("-", "+") if float(text) == 0 else text


def write_error(stderr: float, metric: str) -> str:
    """A standard error of a metric, with the decimals its values have."""
    return f"{stderr * scale_of(metric):.{_decimals(stderr, metric)}f}"


def _decimals(value: float, metric: str) -> int:
    if is_share(metric):
        return 1
    return 3 if abs(value) < 100 else 1
