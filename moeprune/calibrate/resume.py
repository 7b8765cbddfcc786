"""Sums that a killed run goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune.calibrate.stats import Stats
from moeprune.errors import StatsError

KEY = "partial"


def partial_folder(out: Path) -> Path:
    """Where the unfinished sums of the statistics file ``out`` are."""
    return out.with_name(f"{out.name}.partial")


@dataclass
class Partial:
    """The unfinished sums of one rank: a statistics file that says in its ``runs`` how far it has come.

    One file and not two, so that it is replaced in one step: sums and progress always belong together.

    Attributes:
        folder: Where the ranks' files are.
        inputs: Everything that the sums depend on, by name. Sums of other inputs are not gone on from.
        rank: Number of this rank.
        world: Number of ranks.
        every: Seconds between two saves.
        say: Receives one line if there is something to say.
    """

    folder: Path
    inputs: Mapping[str, Any]
    rank: int = 0
    world: int = 1
    every: float = 600.0
    say: Callable[[str], object] = lambda line: None
    _saved: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """This rank's file."""
        return self.folder / f"rank-{self.rank}-of-{self.world}.safetensors"

    def load(self) -> tuple[Stats, dict[str, Any]] | None:
        """The sums and what :meth:`save` was told of them, or None if there are none that fit."""
        others = sorted(set(self.folder.glob("rank-*.safetensors")) - set(self._of_this_world()))
        if not self.path.is_file():
            if others and not any(path.is_file() for path in self._of_this_world()):
                self.say(f"{self.folder}: sums of another number of ranks ({others[0].stem}); starting afresh.")
            return None
        try:
            stats = Stats.load(self.path)
            progress = stats.runs[0][KEY]
            inputs = progress["inputs"]
        except (StatsError, LookupError, TypeError) as error:
            self.say(f"{self.path}: cannot be read; starting afresh. {error}")
            return None
        changed = [name for name in {**self.inputs, **inputs} if inputs.get(name) != self.inputs.get(name)]
        if changed:
            self.say(f"{self.folder}: sums of a run with other {', '.join(changed)}; starting afresh.")
            return None
        return stats, progress

    def save(self, stats: Stats, progress: Mapping[str, Any]) -> None:
        """Write the sums so far.

        Args:
            stats: The sums.
            progress: What :meth:`load` will return beside them.

        Raises:
            StatsError: If a sum is not finite, naming layer and expert.
            OSError: If the file cannot be written.
        """
        stats.check("calibration")
        runs, stats.runs = stats.runs, [{KEY: {**progress, "inputs": dict(self.inputs)}}]
        try:
            stats.save(self.path)
        finally:
            stats.runs = runs
        self._saved = time.monotonic()

    def try_to_save(self, stats: Stats, progress: Mapping[str, Any]) -> None:
        """Write the sums so far; where that is not possible, say so and go on, because all there is now is in memory.

        Raises:
            StatsError: If a sum is not finite, naming layer and expert.
        """
        try:
            self.save(stats, progress)
        except OSError as error:
            self._saved = time.monotonic()
            self.say(
                f"{self.folder}: unfinished sums cannot be saved ({error.strerror or error}). The run goes on; if it "
                "is stopped now, it starts again from what was saved before."
            )

    @property
    def is_due(self) -> bool:
        """Whether the last save was long enough ago."""
        return time.monotonic() - self._saved >= self.every

    def remove(self) -> None:
        """Delete the file; rank 0 deletes those of another number of ranks, too, and the last rank the folder."""
        self.path.unlink(missing_ok=True)
        if self.rank == 0:
            for path in set(self.folder.glob("rank-*.safetensors")) - set(self._of_this_world()):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # other ranks' files are still there, or there is no folder
            self.folder.rmdir()

    def _of_this_world(self) -> list[Path]:
        return [self.folder / f"rank-{rank}-of-{self.world}.safetensors" for rank in range(self.world)]
