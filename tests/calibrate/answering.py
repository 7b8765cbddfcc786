"""One rank that answers prompts in a process of its own: ``torchrun ... answering.py OUT PROMPTS TEXT...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moeprune.calibrate.generate import generate_answers
from moeprune.calibrate.prompts import read_prompts
from moeprune.calibrate.ranks import Ranks
from moeprune.checkpoint.load import load_model, load_tokenizer
from moeprune.data_spec import DataSpec
from moeprune.demo import MODEL_DIR


def main(out: Path, file: Path, texts: list[str]) -> None:
    """Write the answers, and beside them how many prompts this rank was given."""
    ranks = Ranks.current("cpu")
    with ranks.together():
        if ranks.is_first:
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        ranks.wait()
        model, tokenizer = load_model(MODEL_DIR, device="cpu"), load_tokenizer(MODEL_DIR)
        generate, given = model.generate, []
        model.generate = lambda **options: given.append(len(options["input_ids"])) or generate(**options)
        generate_answers(
            model, tokenizer, read_prompts([DataSpec(source=str(file))], tokenizer=tokenizer), out=out,
            max_new_tokens=8, temperature=0.8, batch_size=2, quiet=True, ranks=ranks,
        )  # fmt: skip
        out.with_suffix(f".{ranks.rank}").write_text(str(sum(given)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
