"""Tiny checkpoints in every quantised format, with real quantised values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import quantisers as q
from tests.models import FAMILIES, build
from tests.quantisers import BLOCK, GROUP, Parts


@dataclass(frozen=True)
class Scheme:
    """One way to store a weight.

    Attributes:
        encode: A weight (rows, columns) in float32 to its stored tensors, by the name that replaces ``weight``.
        decode: The inverse.
        config: ``quantization_config`` given the modules that stay unquantised.
        error: Largest |decoded - weight| in units of the largest |weight| of the tensor.
    """

    encode: Callable[[Tensor], Parts]
    decode: Callable[[Parts], Tensor]
    config: Callable[[list[str]], dict[str, Any]]
    error: float


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> Any:
    def config(ignored: list[str]) -> dict[str, Any]:
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
        return {
            "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ignored,
        }  # fmt: skip

    return config


_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_FP8_TENSOR = _FP8 | {"strategy": "tensor"}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
_FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 8, "symmetric": True}

SCHEMES: dict[str, Scheme] = {
    "fp8-block": Scheme(
        q.encode_block, q.decode_block, error=0.04,
        config=lambda ignored: {
            "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic",
            "modules_to_not_convert": ignored,
        },
    ),
    "fp8-static": Scheme(
        q.encode_per_tensor("weight_scale_inv", "activation_scale", ()),
        lambda parts: parts["weight"].float() * parts["weight_scale_inv"], error=0.04,
        config=lambda ignored: {
            "quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static",
            "modules_to_not_convert": ignored,
        },
    ),
    "ct-fp8-channel": Scheme(
        q.encode_per_channel, lambda parts: parts["weight"].float() * parts["weight_scale"], error=0.04,
        config=_compressed("float-quantized", _FP8 | {"strategy": "channel"}),
    ),
    "ct-fp8-tensor": Scheme(
        q.encode_per_tensor("weight_scale", "input_scale", (1,)),
        lambda parts: parts["weight"].float() * parts["weight_scale"], error=0.04,
        config=_compressed("float-quantized", _FP8_TENSOR, _FP8_TENSOR | {"dynamic": False}),
    ),
    "ct-int4": Scheme(
        q.encode_int4, q.decode_int4, error=0.08, config=_compressed("pack-quantized", _INT4 | {"symmetric": True})
    ),
    "ct-int4-asymmetric": Scheme(
        q.encode_int4_asymmetric, q.decode_int4_asymmetric, error=0.1,
        config=_compressed("pack-quantized", _INT4 | {"symmetric": False, "actorder": "group"}),
    ),
    "ct-nvfp4": Scheme(
        q.encode_nvfp4, q.decode_nvfp4, error=0.2,
        config=_compressed("nvfp4-pack-quantized", _FP4, _FP4 | {"dynamic": "local"}),
    ),
    "modelopt-nvfp4": Scheme(
        q.encode_modelopt, q.decode_modelopt, error=0.2,
        config=lambda ignored: {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignored,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _FP4}},
        },
    ),
    "modelopt-fp8": Scheme(
        q.encode_per_tensor("weight_scale", "input_scale", ()),
        lambda parts: parts["weight"].float() * parts["weight_scale"], error=0.04,
        config=lambda ignored: {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignored},
    ),
    "quark-fp8": Scheme(
        q.encode_per_tensor("weight_scale", "input_scale", ()),
        lambda parts: parts["weight"].float() * parts["weight_scale"], error=0.04,
        config=lambda ignored: {
            "quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}, "exclude": ignored,
        },
    ),
    "gptq": Scheme(
        q.encode_gptq, q.decode_gptq, error=0.15,
        config=lambda ignored: {
            "quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False,
            "dynamic": {r"-:.*self_attn\..*": {}, r"-:.*\.gate$": {}},
        },
    ),
    "auto-round": Scheme(
        q.encode_gptq, q.decode_gptq, error=0.15,
        config=lambda ignored: {
            "quant_method": "auto-round", "bits": 4, "group_size": GROUP, "packing_format": "auto_round:auto_gptq",
            "extra_config": {name: {"bits": 16} for name in ignored},
        },
    ),
    "awq": Scheme(
        q.encode_awq, q.decode_awq, error=0.1,
        config=lambda ignored: {
            "quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True,
            "modules_to_not_convert": ignored,
        },
    ),
    "bnb-nf4": Scheme(
        q.encode_nf4, q.decode_nf4, error=0.2,
        config=lambda ignored: {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ignored,
        },
    ),
    "bnb-int8": Scheme(
        q.encode_int8, lambda parts: parts["weight"].float() * parts["SCB"][:, None] / 127, error=0.01,
        config=lambda ignored: {
            "quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ignored,
        },
    ),
}  # fmt: skip

_EXPERT_WEIGHT = re.compile(r"\.experts\.(?P<expert>\d+)\.\w+\.weight$")


def save_quantised(
    family: str, folder: Path, scheme: str, *, unquantised: tuple[str, ...] = (), seed: int = 0
) -> dict[str, Tensor]:
    """Save a tiny model whose experts are stored one by one in a quantised format, and the rest as they were.

    Args:
        family: One of :data:`tests.models.FAMILIES`.
        folder: Where to.
        scheme: One of :data:`SCHEMES`.
        unquantised: Experts' modules to leave unquantised, which the config then names.
        seed: Of the weights.

    Returns:
        The experts' weights before quantisation, by key.
    """
    build(family, seed=seed).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    originals = {key: tensor for key, tensor in tensors.items() if _EXPERT_WEIGHT.search(key)}
    modules = {key.removesuffix(".weight") for key, tensor in tensors.items() if tensor.ndim == 2}
    quantised = {key.removesuffix(".weight") for key in originals} - set(unquantised)
    for module in sorted(quantised):
        parts = SCHEMES[scheme].encode(tensors.pop(f"{module}.weight").float())
        tensors |= {f"{module}.{part}": tensor.contiguous().clone() for part, tensor in parts.items()}
    _write(folder, tensors, SCHEMES[scheme].config(sorted(modules - quantised)))
    return originals


def save_mxfp4(folder: Path, *, seed: int = 0) -> None:
    """Save a tiny gpt-oss as it is released: experts fused, in MXFP4, with unquantised biases."""
    config = FAMILIES["gpt_oss"]()
    config.intermediate_size = 64  # MXFP4 groups 32 values of a row
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, tensor in model.state_dict().items():
        if "norm" not in name:
            tensor.copy_(torch.randn(tensor.shape) * 0.2)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        parts = q.encode_mxfp4(tensors.pop(key).transpose(1, 2).contiguous())
        tensors |= {f"{key}_{part}": tensor for part, tensor in parts.items()}
    ignored = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ignored})


def _write(folder: Path, tensors: dict[str, Tensor], quantization_config: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(config, indent=2))
