"""``python -m benchmarks peers``: moeprune beside llm-compressor and the code of REAP's authors, in one command.

Both are installed in throw-away environments, each with the torch that moeprune runs on. One JSON object a line on
standard output, a table on standard error. Takes about 15 minutes; needs a network or a pip that has the packages.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.peers.measure import measure
from benchmarks.peers.summary import summarise

REAP = "https://github.com/CerebrasResearch/reap"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each tool is run (default 3)")
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration text (default 16384)")
    parser.add_argument("--folder", type=Path, help="for 3 GB of environments; kept if given (default: temporary)")
    parser.add_argument("--reap", default=REAP, help=f"git URL or folder of REAP's code (default {REAP})")
    given = parser.parse_args(arguments)
    with ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for line in measure(folder=folder.resolve(), rounds=given.rounds, tokens=given.tokens, reap=given.reap):
            print(json.dumps(line), flush=True)
            found.append(line)
    print(summarise(found), file=sys.stderr)


if __name__ == "__main__":
    main()
