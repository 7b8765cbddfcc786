"""What a run folder already holds: one fingerprint of its inputs for every finished stage."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moeprune import __version__
from moeprune.errors import RecipeError
from moeprune.files import read_json, sha256_json, write_json

STATE = "run.json"
PACKAGES = ("torch", "transformers", "safetensors", "datasets", "lm_eval", "numpy", "matplotlib")


class RunState:
    """run.json of a folder; written after every stage, so that a killed run goes on where it stopped.

    Args:
        folder: The run folder.

    Raises:
        RecipeError: If run.json is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._path = folder / STATE
        self.data: dict[str, Any] = {"format": 1, "command": "", "versions": versions(), "stages": {}}
        if self._path.is_file():
            try:
                self.data["stages"] = dict(read_json(self._path)["stages"])
            except (ValueError, KeyError, TypeError) as error:
                raise RecipeError(f"{self._path}: damaged ({error}). Delete it, or start over with --force.") from error

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Records of the finished stages by name."""
        return self.data["stages"]

    def is_done(self, stage: str, fingerprint: str, outputs: Iterable[Path]) -> bool:
        """Whether the stage was finished with these very inputs and all its files are still there."""
        record = self.stages.get(stage)
        return record is not None and record["fingerprint"] == fingerprint and all(path.exists() for path in outputs)

    def record(self, stage: str, fingerprint: str, seconds: float) -> None:
        """Note that a stage is finished."""
        self.stages[stage] = {
            "fingerprint": fingerprint,
            "seconds": round(seconds, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.save()

    def forget(self, stage: str) -> None:
        """Note that a stage is about to be redone, so that its old files do not count if the run is killed."""
        if self.stages.pop(stage, None) is not None:
            self.save()

    def save(self) -> None:
        """Write run.json in one step."""
        write_json(self._path, self.data)


def versions() -> dict[str, str]:
    """Versions of everything that has a say in the results."""
    found = {"moeprune": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def fingerprint(**inputs: Any) -> str:
    """Hash of a stage's inputs and of the version of moeprune."""
    return sha256_json({"moeprune": __version__, **inputs})
