"""Colours of page and plots, in one place: names are CSS variables, so plots follow the reader's light or dark theme.

The series colours are those of Okabe and Ito, which remain distinct for colour-blind readers, darkened on white and
lightened on black until they have enough contrast for thin lines.
"""

from __future__ import annotations

LIGHT = {
    "ink": "#1c2330",
    "muted": "#5a6472",
    "faint": "#8b939f",
    "rule": "#dde1e6",
    "paper": "#fffffe",
    "panel": "#f6f7f9",
    "blank": "#f1f0ed",
    "blue": "#0a6aad",
    "orange": "#c4560b",
    "green": "#08805f",
    "amber": "#a8760a",
    "purple": "#a34b86",
    "sky": "#2f8fc4",
}
DARK = {
    "ink": "#e8eaee",
    "muted": "#a7afbb",
    "faint": "#7b8492",
    "rule": "#333a45",
    "paper": "#14171d",
    "panel": "#1c2028",
    "blank": "#0a0c10",
    "blue": "#5fb0ea",
    "orange": "#f58f4b",
    "green": "#43c39c",
    "amber": "#e3b04b",
    "purple": "#dc93c4",
    "sky": "#8ccbf0",
}
SERIES = ("blue", "orange", "green", "purple", "amber", "sky")
"""Order in which the methods of a report take their colours."""


def css_variables(colours: dict[str, str]) -> str:
    """The colours as the body of a CSS rule."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())
