"""``paused.py GO ARGUMENTS``: moeprune, which waits after saving unfinished sums until the file GO is there."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from moeprune.calibrate.resume import Partial
from moeprune.cli import main

if __name__ == "__main__":
    go, save = Path(sys.argv.pop(1)), Partial.save

    def save_and_wait(self: Partial, *arguments: Any) -> None:
        save(self, *arguments)
        while not go.exists():
            time.sleep(0.01)

    Partial.save = save_and_wait  # pyright: ignore[reportAttributeAccessIssue]
    main()
