"""Time and memory of a piece of work, by the process that does it. Uses nothing but the standard library."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 1 << 20


def request() -> dict[str, Any]:
    """What this program was asked for: its only argument, as JSON."""
    return json.loads(sys.argv[1])


def answer(**facts: Any) -> None:
    """Print what was found: the last line of the output, as JSON."""
    print(json.dumps(facts), flush=True)


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Do the work.

    Returns:
        Its result; and CPU seconds of all threads, wall seconds, the largest resident memory of the process in its
        life, and how much of it this work added (``work_mib``; not on systems without ``/proc``).
    """
    before = _status("VmRSS")
    if before is not None:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far: proc_pid_clear_refs(5)
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    spent = {"cpu_seconds": cpu, "wall_seconds": wall, "peak_mib": _peak_mib()}
    after = _status("VmHWM")
    if before is not None and after is not None:
        spent["work_mib"] = after - before
    return result, spent


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def _status(name: str) -> float | None:
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    return next(float(line.split()[1]) / 1024 for line in path.read_text().splitlines() if line.startswith(name + ":"))
