"""The demo corpus as token streams, and the training batches drawn from them."""

from pathlib import Path

import numpy as np

from moeprune.demo.split import stable_hash


def prepare(corpus, *, tokenizer, out):
    """Writes each domain's training stream to `out/tokens/{domain}.npz`: documents, each after an end token.

    Args:
        corpus: as `moeprune.demo.corpus.build` returns it.
        tokenizer: the demo tokenizer.
        out: training folder.
    """
    folder = Path(out) / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    newlines = _line_end_ids(tokenizer)
    for domain, splits in corpus.items():
        texts = sorted(splits["train"], key=stable_hash)
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        stream = np.concatenate([[tokenizer.bos_token_id, *ids] for ids in encoded]).astype(np.uint16)
        starts = np.flatnonzero(np.isin(stream, [tokenizer.bos_token_id, *newlines])) + 1
        temporary = folder / f".{domain}.npz"
        np.savez(temporary, stream=stream, starts=starts.astype(np.int64))
        temporary.replace(folder / f"{domain}.npz")


def _line_end_ids(tokenizer):
    return [i for token, i in tokenizer.get_vocab().items() if set(token) == {"Ċ"}]


class Batches:
    """Windows of training text that begin at line starts; every batch holds equally many rows of each domain."""

    def __init__(self, out, *, domains, seed):
        """Loads the streams that `prepare` wrote under `out`."""
        self.streams = [dict(np.load(Path(out) / "tokens" / f"{d}.npz")) for d in domains]
        self.seed = seed

    def draw(self, step, *, rank, rows, length, end_id):
        """Draws the batch of one step; the same arguments always give the same batch.

        Args:
            step: optimiser step, so that a resumed run goes on where it stopped.
            rank: index of the process.
            rows: number of rows, a multiple of the number of domains.
            length: tokens to predict in each row.
            end_id: end-of-text token; half of the rows begin with it, so that the model serves prompts with and
                without it.

        Returns:
            Int64 array [rows, length + 1].
        """
        rng = np.random.default_rng([self.seed, step, rank])
        batch = []
        for row in range(rows):
            data = self.streams[row % len(self.streams)]
            start = rng.choice(data["starts"][: np.searchsorted(data["starts"], len(data["stream"]) - length - 1)])
            window = data["stream"][start : start + length + 1].astype(np.int64)
            batch.append(np.concatenate([[end_id], window[:-1]]) if rng.random() < 0.5 else window)
        return np.stack(batch)
