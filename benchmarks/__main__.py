"""``python -m benchmarks [calibrate|export|rehearsal]``: measure what calibration and export cost, on models made here.

``python -m benchmarks streaming``, ``peers`` and ``gpu`` have options of their own: see their ``--help``.

Two things are compared by doing them in turn, and the median of the ratios of neighbours is printed: machines drift,
ratios of neighbours do not.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

EVERYTHING = ["calibrate", "export", "rehearsal"]
SEPARATE = ("streaming", "peers", "gpu")


def main() -> None:
    """Run the chosen measurements and print one JSON object a line."""
    if sys.argv[1:2] and sys.argv[1] in SEPARATE:
        name = sys.argv.pop(1)
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="*", choices=EVERYTHING, default=EVERYTHING)
    parser.add_argument("--pairs", type=int, default=9, help="pairs of runs (default 9)")
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are made: 25 GB for export, 1 GB for rehearsal (default: /tmp)"
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # with one thread, CPU seconds repeat
    # These first: they measure other processes, and this one must still be small.
    if "rehearsal" in arguments.what:
        from benchmarks.rehearsal import measure as rehearse

        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            print(json.dumps(rehearse(folder=Path(folder))), flush=True)
    if "export" in arguments.what:
        from benchmarks.exporting import measure as measure_export

        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            print(json.dumps(measure_export(folder=Path(folder), pairs=arguments.pairs)), flush=True)
    if "calibrate" in arguments.what:
        from benchmarks.calibration import measure

        for dtype in ("float32", "bfloat16"):
            print(json.dumps(measure(dtype=dtype, pairs=arguments.pairs)), flush=True)


if __name__ == "__main__":
    main()
