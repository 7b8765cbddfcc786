"""Pruning and converting commute: convert(export(checkpoint)) equals export(convert(checkpoint)), tensor for tensor.

llama.cpp's own converter makes the files, so this also shows that experts keep their order in GGUF. It needs a copy of
llama.cpp (or the source distribution of llama-cpp-python, which holds one), and no build:
``LLAMA_CPP=path/to/llama.cpp pytest -m engine tests/gguf``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader

from moeprune.anatomy.source import open_source
from moeprune.anatomy.tiny import tiny_config
from moeprune.checkpoint.classes import model_class
from moeprune.export.export import export_checkpoint
from moeprune.gguf.export import export_gguf
from moeprune.gguf.verify import verify_gguf
from moeprune.resources import DEMO_DIR
from tests.gguf.files import entries
from tests.pruning import random_plan

LLAMA_CPP = os.environ.get("LLAMA_CPP", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not Path(LLAMA_CPP, "convert_hf_to_gguf.py").is_file(), reason="LLAMA_CPP names no copy of llama.cpp"
    ),
]
# What llama.cpp's converter takes at toy size. Others want keys of the published configs that the config class lacks.
CONVERTIBLE = (
    "afmoe", "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "hy_v3", "jamba", "laguna", "lfm2_moe", "llama4", "llama4_text", "mellum",
    "minimax_m2", "mixtral", "nemotron_h", "olmoe", "qwen2_moe", "qwen3_moe", "qwen4_exp", "qwen4_exp_text",
    "solar_open",
)  # fmt: skip
CHANGES = {  # the converter knows no dense layers in these
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
}
ADDED = {"minimax_m2": {"rotary_dim": 4}}  # keys of the published config that the config class does not write


def save(model_type: str, folder: Path) -> Path:
    """A tiny model of the type, with random weights, as a checkpoint."""
    torch.manual_seed(0)
    config = tiny_config(transformers.CONFIG_MAPPING[model_type], **CHANGES.get(model_type, {}))
    model = model_class(config)._from_config(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape) * 0.2)
    model.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ADDED.get(model_type, {})))
    return folder


def convert(model: Path, out: Path, kind: str) -> GGUFReader:
    script = Path(__file__).with_name("convert.py")
    command = [sys.executable, str(script), LLAMA_CPP, str(model), str(out), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return GGUFReader(out)


def same(one: GGUFReader, other: GGUFReader) -> None:
    """Same tensors, byte for byte, and the same metadata but for names and our own entries."""
    left, right = ({tensor.name: tensor for tensor in reader.tensors} for reader in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.tensor_type == right[name].tensor_type, name
        assert np.array_equal(tensor.data.view(np.uint8), right[name].data.view(np.uint8)), name
    said = []
    for reader in (one, other):
        said.append({k: v for k, v in entries(reader).items() if not k.startswith(("general.", "moeprune."))})
    assert said[0] == said[1]


@pytest.mark.parametrize("model_type", CONVERTIBLE)
def test_pruning_a_converted_model_equals_converting_a_pruned_one(model_type: str, tmp_path: Path) -> None:
    source = save(model_type, tmp_path / "source")
    facts = open_source(source).facts
    keep = facts.num_experts * 3 // 4 if facts.routing.n_group > 1 else 7
    plan = random_plan(facts, keep=keep, top_k=max(1, facts.top_k - 1))
    export_checkpoint(source, plan=plan, out=tmp_path / "pruned", quiet=True)
    convert(source, tmp_path / "source.gguf", "f32")
    export_gguf(tmp_path / "source.gguf", plan=plan, out=tmp_path / "pruned.gguf", quiet=True)
    same(GGUFReader(tmp_path / "pruned.gguf"), convert(tmp_path / "pruned", tmp_path / "converted.gguf", "f32"))


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_the_embedded_model_with_its_tokenizer_too(kind: str, tmp_path: Path) -> None:
    source = DEMO_DIR / "model"
    plan = random_plan(open_source(source).facts, keep=48, top_k=6)
    export_checkpoint(source, plan=plan, out=tmp_path / "pruned", quiet=True)
    convert(source, tmp_path / "source.gguf", kind)
    export_gguf(tmp_path / "source.gguf", plan=plan, out=tmp_path / "pruned.gguf", quiet=True)
    same(GGUFReader(tmp_path / "pruned.gguf"), convert(tmp_path / "pruned", tmp_path / "converted.gguf", kind))
    checks = verify_gguf(tmp_path / "pruned.gguf", against=tmp_path / "source.gguf", quiet=True)
    assert all(check.passed for check in checks), checks
