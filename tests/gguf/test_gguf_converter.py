"""Pruning and converting commute: convert(export(checkpoint)) equals export(convert(checkpoint)), tensor for tensor.

llama.cpp's own converter makes the files, so this also shows that experts keep their order in GGUF. It needs a copy of
llama.cpp (or the source distribution of llama-cpp-python, which holds one), and no build:
``LLAMA_CPP=path/to/llama.cpp pytest -m engine tests/gguf``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from moeprune.anatomy.source import open_source
from moeprune.export.export import export_checkpoint
from moeprune.gguf.export import export_gguf
from moeprune.gguf.verify import verify_gguf
from moeprune.resources import DEMO_DIR
from tests.gguf.files import entries
from tests.models import save
from tests.pruning import COUNTS, random_plan

LLAMA_CPP = os.environ.get("LLAMA_CPP", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not Path(LLAMA_CPP, "convert_hf_to_gguf.py").is_file(), reason="LLAMA_CPP names no copy of llama.cpp"
    ),
]
# The tiny qwen3_moe has a dense layer, which the converter does not know there; the embedded model has none.
CONVERTIBLE = [family for family in COUNTS if family != "qwen3_moe"]


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


@pytest.mark.parametrize("family", CONVERTIBLE)
def test_pruning_a_converted_model_equals_converting_a_pruned_one(family: str, tmp_path: Path) -> None:
    source = save(family, tmp_path / "source")
    keep, top_k = COUNTS[family]
    plan = random_plan(open_source(source).facts, keep=keep, top_k=top_k)
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
