"""Make what all tools read: a model with 64 experts a layer, top-8, and packed token ids of the embedded text."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import torch
from clock import answer, request
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

DEMO = Path(str(files("moeprune.demo"))) / "model"
TEXT = Path(str(files("moeprune.demo"))) / "calibration"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
OLDER_NAMES = {"num_experts": "num_local_experts"}  # which transformers 4 reads


def make_model(folder: Path) -> int:
    """A Qwen3-MoE of 27 M random parameters whose routers and experts differ, so that load and saliency are uneven.

    Returns:
        Number of parameters.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_experts=64, num_experts_per_tok=8,
        moe_intermediate_size=128, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
        max_position_embeddings=4096, norm_topk_prob=True, initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            # Logits of all tokens lean towards some experts, as those of trained routers do.
            layer.mlp.gate.weight *= torch.randn(config.num_experts, 1).mul(0.3).exp()
            layer.mlp.experts.down_proj *= torch.randn(config.num_experts, 1, 1).mul(0.5).exp()
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
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    parameters = make_model(folder / "random")
    copy_demo(folder / "trained")
    ids = read_ids(asked["tokens"] // asked["length"], asked["length"])
    save_file({"ids": ids}, folder / "ids.safetensors")
    answer(parameters=parameters, rows=len(ids), tokens=ids.numel())


if __name__ == "__main__":
    main()
