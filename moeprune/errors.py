"""Everything moeprune refuses, as exceptions.

Rules for a new one: derive it from :class:`MoePruneError` *and* from the standard-library class a caller would catch;
say what was given, what was expected and what to do; keep it constructible from one message, so that it pickles.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoePruneError(Exception):
    """Root of all errors that a user can mend. The command line prints its text without a traceback."""


class RecipeError(MoePruneError, ValueError):
    """A recipe that cannot be read or asks for something that does not exist."""


class CheckpointError(MoePruneError, ValueError):
    """A folder that is not a complete safetensors checkpoint, or a damaged file in one."""


class UnsupportedModelError(MoePruneError, ValueError):
    """A model without experts, or with experts that moeprune cannot index."""


class RoomError(MoePruneError, OSError):
    """Too little memory or disk for what was asked."""


class RankError(MoePruneError, ConnectionError):
    """A process that calibrates together with this one does not answer."""


class DataError(MoePruneError, ValueError):
    """Calibration text that is missing, empty or of the wrong shape."""


class StatsError(MoePruneError, ValueError):
    """A statistics file that is damaged, of another model or too thin for what was asked."""


class PlanError(MoePruneError, ValueError):
    """A plan that is impossible, or that belongs to another model."""


class DeployError(MoePruneError, ValueError):
    """An engine, a GPU or a spread over devices that does not exist."""


class ExportError(MoePruneError, RuntimeError):
    """An export that would overwrite something or that could not be completed."""


class VerifyError(MoePruneError, RuntimeError):
    """A pruned checkpoint that differs from what its plan says."""


class EvaluationError(MoePruneError, ValueError):
    """An evaluation that names an unknown task or cannot be run."""


class MissingDependencyError(MoePruneError, ImportError):
    """An optional package is needed; the text names the extra that brings it."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest known name, then all of them.

    Args:
        given: What the user wrote.
        known: The names that would have been accepted.
    """
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names) if names else 'none'}."
