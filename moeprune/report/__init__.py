"""What a slimmed model costs and what it still knows, beside the original: report.json, report.md and report.html."""

from moeprune.report.facts import ReportError
from moeprune.report.write import summary_table, write_report

__all__ = ["ReportError", "summary_table", "write_report"]
