"""Make what all tools read: a model with 64 experts a layer, top-8, and packed token ids of the embedded text."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import torch
from clock import answer, request
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.models import SMALL, make_qwen3_moe

DEMO = Path(str(files("moeprune.demo"))) / "model"
TEXT = Path(str(files("moeprune.demo"))) / "calibration"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
OLDER_NAMES = {"num_experts": "num_local_experts"}  # which transformers 4 reads


def make_model(folder: Path) -> int:
    """A Qwen3-MoE of 27 M random parameters; returns how many exactly."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = make_qwen3_moe(SMALL | special | {"vocab_size": len(tokenizer)}, dtype="float32")
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, folder / name)
    _read_by_older_versions(folder)
    return model.num_parameters()


def copy_demo(folder: Path) -> None:
    """The embedded model: small, but trained."""
    shutil.copytree(DEMO, folder)
    _read_by_older_versions(folder)


def read_ids(num_rows: int, length: int) -> torch.Tensor:
    """Rows without padding, as many of each domain of the embedded calibration text, (rows, length), int64."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO)
    domains = sorted(TEXT.glob("*.jsonl"))
    rows = []
    for path in domains:
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        flat = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        needed = -(-num_rows // len(domains)) * length
        if len(flat) < needed:
            raise SystemExit(f"{path.name} has {len(flat)} tokens, {needed} are needed. Ask for fewer --tokens.")
        rows.append(torch.tensor(flat[:needed]).view(-1, length))
    return torch.stack(rows, dim=1).flatten(0, 1)[:num_rows].contiguous()


def _read_by_older_versions(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {new: config[old] for new, old in OLDER_NAMES.items()}
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2))


def main() -> None:
    """Make both models and the ids in a folder."""
    asked = request()
    folder = Path(asked["folder"])
    parameters = make_model(folder / "random")
    copy_demo(folder / "trained")
    ids = read_ids(asked["tokens"] // asked["length"], asked["length"])
    save_file({"ids": ids}, folder / "ids.safetensors")
    answer(parameters=parameters, rows=len(ids), tokens=ids.numel())


if __name__ == "__main__":
    main()
