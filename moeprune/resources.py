"""Files that ship with moeprune: recipes, task sets, the embedded model.

In a checkout the recipes and the task sets are top-level folders; in an installed wheel they lie in
``moeprune/_shipped``.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
DEMO = "demo"
DEMO_DIR = PACKAGE_DIR / "demo"


def shipped(folder: str) -> Path:
    """The folder ``recipes`` or ``eval``, wherever this installation keeps it.

    Args:
        folder: ``"recipes"`` or ``"eval"``.

    Raises:
        FileNotFoundError: If the installation lacks it.
    """
    for root in (PACKAGE_DIR / "_shipped", PACKAGE_DIR.parent):
        if (root / folder).is_dir():
            return root / folder
    raise FileNotFoundError(f"this installation of moeprune has no folder {folder!r}; reinstall it")


def recipes() -> dict[str, Path]:
    """The shipped recipes by name (``quickstart`` -> ``.../recipes/quickstart.yaml``)."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"))}
