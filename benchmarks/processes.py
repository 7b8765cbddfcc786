"""Time and memory of other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """A process that ended well.

    Attributes:
        seconds: Wall seconds.
        peak_mib: Largest resident memory in MiB.
        output: What it printed.
    """

    seconds: float
    peak_mib: float
    output: str


def run(*command: object) -> Run:
    """Run a command and measure it.

    The peak is that of the process alone only while this one is small: until it is replaced by the program, a new
    process counts the memory of the one that began it.

    Raises:
        RuntimeError: If it fails.
    """
    begun = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit status {process.returncode}")
    return Run(time.perf_counter() - begun, usage.ru_maxrss / 1024, output)


def moeprune(*arguments: object) -> Run:
    """Run ``moeprune`` with this interpreter."""
    return run(sys.executable, "-m", "moeprune", *arguments)
