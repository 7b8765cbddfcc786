"""From the facts of a run to the three files of a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune.errors import MissingDependencyError
from moeprune.files import write_json, write_text
from moeprune.report.facts import read_facts
from moeprune.report.markdown import markdown, summary


def write_report(facts: Mapping[str, Any], *, out_dir: Path) -> Path:
    """Write ``report.json``, ``report.md`` and ``report.html``, each to a temporary name that is then renamed.

    Args:
        facts: Plain JSON values; :class:`moeprune.report.facts.Facts` describes them.
        out_dir: Folder for the files, made if it is not there.

    Returns:
        The path of ``report.html``, a page that loads nothing from elsewhere.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ReportError: The facts are incomplete or of another format.
    """
    read = read_facts(facts)
    _require_matplotlib()
    from moeprune.report.page import page
    from moeprune.report.plots import plots

    text, html = markdown(read), page(read, plots(read))
    write_json(out_dir / "report.json", dict(facts))
    write_text(out_dir / "report.md", text)
    write_text(out_dir / "report.html", html)
    return out_dir / "report.html"


def summary_table(facts: Mapping[str, Any]) -> str:
    """The table printed at the end of a run: Markdown whose columns also line up as plain text.

    Args:
        facts: As for :func:`write_report`.

    Raises:
        ReportError: The facts are incomplete or of another format.
    """
    return summary(read_facts(facts))


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            "The report's plots need matplotlib, which is not installed. Run: pip install 'moeprune[report]'"
        ) from None
