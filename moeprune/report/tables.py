"""Tables as data: the same cells become HTML, Markdown and the text at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from moeprune.format import byte_unit, count, duration, percent, size, speed
from moeprune.report.comparison import (
    Family,
    Score,
    active_share,
    byte_share,
    difference,
    families,
    result_of,
    scores,
)
from moeprune.report.facts import Facts, Spread, Variant
from moeprune.report.findings import tone
from moeprune.report.metrics import Kind, unit_of, write_change, write_error, write_value

MARK = "*"
_MANY_DOMAINS = 10


@dataclass(frozen=True)
class Column:
    """A column's heading; neighbours with the same ``over`` share a heading above, else ``alone`` is the heading."""

    title: str
    unit: str = ""
    over: str = ""
    alone: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A number, a second smaller line, whether it is worse or better, and a tint from -1 (better) to 1 (worse)."""

    text: str
    sub: str = ""
    tone: str = ""
    tint: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a title, notes below it, and rows that each begin with a name."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    strong_row: int | None = None


def main_table(facts: Facts) -> Table:
    """All variants: what they cost, what they score, how fast they are."""
    columns, unit = [Column("variant", numeric=False)], byte_unit(facts.original.bytes)
    columns += [Column("experts"), Column("top-k")]
    columns += [Column("all", over="Parameters", alone="parameters")]
    columns += [Column("active", over="Parameters", alone="active parameters"), Column("size", over="Storage")]
    columns += [Column(score_title(score), unit_of(score.metric), over=score.kind) for score in scores(facts)]
    speeds = any(variant.throughput for variant in facts.variants)
    if speeds:
        columns += [Column(word, "tokens/s", over=speed_heading(facts)) for word in ("prefill", "decode")]
    rows = []
    for variant in facts.variants:
        row = [Cell(variant.name, sub="original" if variant.name == facts.baseline != "original" else "")]
        row += [Cell(str(variant.num_experts)), Cell(str(variant.top_k))]
        row += [
            Cell(count(variant.parameters), percent(variant.parameters / facts.original.parameters)),
            Cell(count(variant.active_parameters), percent(active_share(facts, variant))),
            Cell(size(variant.bytes, unit), percent(byte_share(facts, variant))),
        ]
        row += [score_cell(facts, variant, score, score.name) for score in scores(facts)]
        if speeds:
            load = variant.throughput
            row += [_speed_cell(load.prefill_tokens_per_second if load else None)]
            row += [_speed_cell(load.decode_tokens_per_second if load else None)]
        rows.append(row)
    strong = next(i for i, variant in enumerate(facts.variants) if variant.name == facts.baseline)
    return Table("All variants", columns, rows, main_notes(facts), strong)


def score_title(score: Score) -> str:
    """A score's heading: its name, as the unit follows below."""
    return score.name.replace("_", " ")


def score_cell(facts: Facts, variant: Variant, score: Score | Family, name: str) -> Cell:
    """A score ± standard error, with the paired difference below; an asterisk where it exceeds two standard errors."""
    result = result_of(variant, name)
    if result is None:
        return Cell("", note="not measured")
    text = write_value(result.value, score.metric)
    if result.stderr is not None:
        text += f" ± {write_error(result.stderr, score.metric)}"
    change = difference(facts, variant, name)
    if change is None:
        return Cell(text, note=_items(result.n))
    sub = write_change(change.value, score.metric)
    if change.stderr is not None:
        sub += f" ± {write_error(change.stderr, score.metric)}"
    sub += (MARK if change.measurable else "") + ("" if change.paired else " (unpaired)")
    return Cell(text, sub, tone(facts, variant, name, higher_is_better=score.higher_is_better), note=_items(result.n))


def speed_heading(facts: Facts) -> str:
    """Says what kind of speed was measured, so that nobody reads it as a serving engine's."""
    engines = sorted({variant.throughput.engine for variant in facts.variants if variant.throughput})
    if engines == ["transformers"]:
        return "Speed: plain transformers, not a serving engine"
    return f"Speed: {', '.join(engines)}"


def main_notes(facts: Facts) -> list[str]:
    """How to read the main table."""
    notes = [
        "± is one standard error. The second line is the difference from the original on the same items; "
        f"{MARK} marks a difference larger than two standard errors."
    ]
    if any(score.kind == Kind.LOSS for score in scores(facts)):
        notes.append("For a loss such as bits per byte, lower is better.")
    if len({score.kind for score in scores(facts)} - {Kind.LOSS}) > 1:
        notes.append("Multiple-choice and generative scores measure different things and are never averaged.")
    notes.append("Active parameters are those read for one token.")
    loads = {}
    for variant in facts.variants:
        if (timed := variant.throughput) is not None:
            loads[
                f"{timed.engine} on {timed.device}, {timed.dtype}, batch {timed.batch}, "
                f"{timed.prompt_tokens} prompt and {timed.new_tokens} new tokens"
            ] = None
    if loads:
        notes.append(f"{speed_heading(facts)}; median (lowest to highest); {'; '.join(loads)}.")
    return notes


def domain_tables(facts: Facts) -> list[Table]:
    """One table a family: every variant by every domain, tinted by how much worse it is than the original."""
    return [_domain_table(facts, family) for family in families(facts)]


def _domain_table(facts: Facts, family: Family) -> Table:
    names = list(zip(family.domains, family.tasks, strict=True))
    if family.group is not None:
        names.append(("all domains", family.group))
    tints = {
        (variant.name, task): _tint(facts, variant, family, task) for variant in facts.variants for _, task in names
    }
    turned = len(names) > max(_MANY_DOMAINS, len(facts.variants))
    cells = {
        (variant.name, task): _domain_cell(score_cell(facts, variant, family, task), tints[variant.name, task])
        for variant in facts.variants
        for _, task in names
    }
    notes = ["Second line: difference from the original. Tint: how much worse (or better) than the original."]
    unit = " (%)" if unit_of(family.metric) == "%" else ""
    title = f"{_capital(family.title)} by {family.member}{unit}"
    if turned:
        columns = [Column(family.member, numeric=False), *(Column(variant.name) for variant in facts.variants)]
        rows = [[Cell(label), *(cells[variant.name, task] for variant in facts.variants)] for label, task in names]
        return Table(title, columns, rows, notes)
    columns = [Column("variant", numeric=False), *(Column(label) for label, _ in names)]
    rows = [[Cell(variant.name), *(cells[variant.name, task] for _, task in names)] for variant in facts.variants]
    strong = next(i for i, variant in enumerate(facts.variants) if variant.name == facts.baseline)
    return Table(title, columns, rows, notes, strong)


def _domain_cell(cell: Cell, tint: float) -> Cell:
    """Without the standard error of the value, which the note keeps: side by side it is the difference that counts."""
    value, _, error = cell.text.partition(" ± ")
    note = f"± {error}, {cell.note}" if error and cell.note else cell.note
    return replace(cell, text=value, tint=tint, note=note)


def _tint(facts: Facts, variant: Variant, family: Family, task: str) -> float:
    """1 where a loss rose by half or a score fell by 30 points, 0 at the original; a square root shows small ones."""
    change, reference = difference(facts, variant, task), result_of(facts.original, task)
    if change is None or reference is None:
        return 0.0
    full = 0.5 * abs(reference.value) if not family.higher_is_better else 0.3 if unit_of(family.metric) == "%" else 0.0
    if not full:
        return 0.0
    amount = min(abs(change.value) / full, 1.0) ** 0.5
    return round(amount if change.worse(family.higher_is_better) else -amount, 2)


def calibration_table(facts: Facts) -> Table | None:
    """Tokens by domain."""
    if facts.calibration is None or not facts.calibration.domains:
        return None
    rows = [
        [Cell(name), Cell(f"{tokens:,}"), Cell(percent(tokens / max(facts.calibration.tokens, 1)))]
        for name, tokens in facts.calibration.domains.items()
    ]
    return Table("Calibration", [Column("domain", numeric=False), Column("tokens"), Column("share")], rows)


def pairs_table(title: str, heads: tuple[str, str], pairs: dict[str, str]) -> Table | None:
    """A table of names and values."""
    if not pairs:
        return None
    columns = [Column(heads[0], numeric=False), Column(heads[1], numeric=False)]
    return Table(title, columns, [[Cell(name), Cell(value)] for name, value in pairs.items()])


def environment_table(facts: Facts) -> Table | None:
    """Versions of what ran."""
    return pairs_table(
        "Environment", ("package", "version"), {name: str(value) for name, value in facts.environment.items()}
    )


def seconds_table(facts: Facts) -> Table | None:
    """How long each stage took."""
    times = {name.replace("_", " "): duration(value) for name, value in facts.seconds.items()}
    return pairs_table("Time taken", ("stage", "time"), times)


def _speed_cell(spread: Spread | None) -> Cell:
    if spread is None:
        return Cell("")
    span = f"{speed(spread.min)} to {speed(spread.max)}" if spread.n > 1 else ""
    return Cell(speed(spread.median), span, note=f"{spread.n} runs")


def _items(n: int | None) -> str:
    return f"{n:,} items" if n is not None else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
