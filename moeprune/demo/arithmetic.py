"""Generated arithmetic exercises, one a line: `37+48=85`, `85-37=48`, `7*8=56`.

Exercises are split by the unordered pair {x, y} behind them, and x+y, y+x, (x+y)-x and (x+y)-y share their pair's
split, so an evaluated sum was never trained on, not even turned around. Products are too few to hold out: they are only
in the training and calibration text and are not evaluated.
"""

import random

from moeprune.demo.split import split_of

LARGEST = 99
LARGEST_FACTOR = 12


def pairs(split):
    """All unordered pairs (x, y), 0 <= x <= y <= 99, that belong to `split`."""
    every = ((x, y) for x in range(LARGEST + 1) for y in range(x, LARGEST + 1))
    return [p for p in every if split_of(f"arithmetic:{p[0]}:{p[1]}") == split]


def forms(pair):
    """The four (prompt, answer) exercises behind a pair, e.g. ("37+48=", "85"); fewer where they coincide."""
    x, y = pair
    exercises = [(f"{x}+{y}=", x + y), (f"{y}+{x}=", x + y), (f"{x + y}-{x}=", y), (f"{x + y}-{y}=", x)]
    return [(prompt, str(answer)) for prompt, answer in dict(exercises).items()]


def documents(split, *, count, lines=40):
    """Generates `count` documents of up to `lines` exercises each, reproducibly.

    Args:
        split: "train", "heldout" or "calibration"; only pairs of this split are used.
        count: number of documents.
        lines: largest number of exercises in a document.

    Returns:
        List of texts; every line, the last one too, ends in a newline.
    """
    rng = random.Random(f"arithmetic {split}")
    both = pairs(split)
    small = [p for p in both if p[1] <= 9]
    texts = []
    for _ in range(count):
        rows = [_exercise(rng, both=both, small=small, products=split != "heldout") for _ in range(lines)]
        texts.append("".join(f"{row}\n" for row in rows))
    return texts


def _exercise(rng, *, both, small, products):
    kind = rng.random()
    if products and kind < 0.1:
        x, y = rng.randint(0, LARGEST_FACTOR), rng.randint(0, LARGEST_FACTOR)
        return f"{x}*{y}={x * y}"
    # single-digit sums are the building block of the longer ones, and too rare among uniform pairs
    pair = rng.choice(small if small and kind < 0.25 else both)
    return "".join(rng.choice(forms(pair)))
