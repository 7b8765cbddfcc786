"""The checkpoints that the benchmarks make are what they say, and what is measured is measured right."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

from safetensors import safe_open

from benchmarks.caches import cached_share, cool, warm
from benchmarks.checkpoints import deepseek_v3, qwen3_moe, read_config, write_checkpoint
from benchmarks.processes import run
from moeprune.anatomy.source import open_source

PUBLISHED = Path(__file__).parent / "anatomy" / "published"
SMALLER = {
    "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "num_hidden_layers": 4,
    "n_routed_experts": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 500, "q_lora_rank": 128,
    "kv_lora_rank": 64, "num_experts": 16, "max_window_layers": 4, "head_dim": 32,
}  # fmt: skip


def config_of(name: str) -> dict:
    config = read_config(PUBLISHED / f"{name}.json")
    return config | {key: value for key, value in SMALLER.items() if key in config}


def test_the_rehearsal_has_the_layout_that_the_config_asks_for(tmp_path):
    config = config_of("DeepSeek-V3")
    write_checkpoint(tmp_path / "m", config=config, tensors=deepseek_v3(config), num_shards=5, sparse=True)
    source = open_source(tmp_path / "m")
    assert len(source.checkpoint.shards) == 5
    assert source.facts.num_experts == 16
    assert source.facts.layers == ("model.layers.3",)
    assert any(name.startswith("model.layers.4.") for name in source.mtp)
    quantised = [name for name in source.checkpoint.tensors if name.endswith("_scale_inv")]
    assert len(quantised) == 5 * 5 + 3 * 3 + 2 * 3 * 17, "attention, dense layers, experts and the shared one"


def test_the_rehearsal_is_as_large_as_the_model():
    """685 B on the Hub, of which 671 B are the main model (https://huggingface.co/deepseek-ai/DeepSeek-V3)."""
    config = read_config(PUBLISHED / "DeepSeek-V3.json")
    sizes = {name: prod(shape) for name, _, shape in deepseek_v3(config)}
    extra = sum(size for name, size in sizes.items() if name.startswith("model.layers.61."))
    assert round(sum(sizes.values()) / 1e9) == 685
    assert round((sum(sizes.values()) - extra) / 1e9) == 671


def test_noise_is_finite_and_fills_every_tensor(tmp_path):
    config = config_of("Qwen3-30B-A3B")
    write_checkpoint(tmp_path / "m", config=config, tensors=qwen3_moe(config), num_shards=2, sparse=False)
    source = open_source(tmp_path / "m")
    assert len(source.facts.layers) == 4
    for shard in source.checkpoint.shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                values = file.get_tensor(name).float()
                assert values.min() >= 1
                assert values.max() < 2


def test_the_share_of_a_file_that_is_in_memory(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * (5 << 20))
    warm([file])
    assert cached_share([file]) == 1
    cool([file])
    assert cached_share([file]) in (0, 1), "1 where the temporary folder itself is memory"


def test_the_peak_of_another_process_is_its_own():
    script = "x = bytearray(150 << 20); print('done')"
    small, large = run(sys.executable, "-c", "print('done')"), run(sys.executable, "-c", script)
    assert large.output == "done\n"
    assert large.peak_mib > small.peak_mib or small.peak_mib > 150, "the tests' own memory counts while it is larger"
    assert large.peak_mib > 150
