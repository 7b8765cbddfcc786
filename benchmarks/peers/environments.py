"""Throw-away environments for the tools that moeprune is measured beside. Imports no torch: see ``processes.run``."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

from moeprune.files import write_text

LLM_COMPRESSOR = ("llmcompressor==0.14.0",)
TRANSFORMERS_OF_REAP = ("transformers==4.55.0", "accelerate>=1.7.0", "numpy")  # as its pyproject.toml pins them
REAP_COMMIT = "1970473c51ca3caeb98c10392f15b3a08a672974"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


class Unavailable(Exception):
    """A tool could not be installed here."""


def make_environment(folder: Path, *, packages: tuple[str, ...]) -> Path:
    """A virtual environment with the very torch that moeprune runs on, and some packages.

    Args:
        folder: Where it is; one that is complete is used again.
        packages: As pip takes them.

    Returns:
        Its Python.

    Raises:
        Unavailable: If pip fails, with what it said.
    """
    python, complete = folder / "bin" / "python", folder / "complete.txt"
    torch = version("torch")
    wanted = "\n".join([f"torch=={torch}", *packages])
    if complete.exists() and complete.read_text() == wanted:
        return python
    print(f"Installing {', '.join(packages)} in {folder}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    # Alone and without what it depends on: the extra index knows nothing else, and may be out of reach.
    index = ("--extra-index-url", CPU_WHEELS) if torch.endswith("+cpu") else ()
    _checked(python, "-m", "pip", "install", "--quiet", "--no-deps", *index, f"torch=={torch}")
    _checked(python, "-m", "pip", "install", "--quiet", f"torch=={torch}", *packages)
    write_text(complete, wanted)
    return python


def clone_reap(folder: Path, *, source: str) -> Path:
    """The code of REAP's authors at the commit that was read.

    Args:
        folder: Where it is put.
        source: A git URL or folder.

    Raises:
        Unavailable: If git fails, with what it said.
    """
    if not folder.exists():
        _checked("git", "clone", "--quiet", "--no-checkout", source, folder)
    _checked("git", "-C", folder, "checkout", "--quiet", REAP_COMMIT)
    return folder


def _checked(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{' '.join(map(str, command))}: {done.stderr.strip()[-600:]}")
