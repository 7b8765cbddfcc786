"""Quantisers of tiny weights, and slow readings of what they store.

``encode`` follows the quantiser's own packing and ``decode`` is a slow reading of the format's definition, so that a
test can tell a weight from its neighbour. Weights are (rows, columns) in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

GROUP = 8  # weights that share a scale, in the grouped formats
BLOCK = 8  # side of a square of weights that share a scale
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
F8 = torch.float8_e4m3fn
F8_MAX = 448.0
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight columns in an int32 (AutoAWQ's gemm layout)
# The 16 values of NF4: quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E).
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip

Parts = dict[str, Tensor]


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """The index in ``table`` of the value nearest to each of ``values``."""
    return (values.unsqueeze(-1) - table).abs().argmin(-1)


def spread(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Each scale repeated over the rows and columns that share it."""
    rows, columns = shape[-2] // scales.shape[-2], shape[-1] // scales.shape[-1]
    return scales.repeat_interleave(rows, -2).repeat_interleave(columns, -1)


def pack(codes: Tensor, *, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Integers below 2**bits packed along the last axis into int32, lowest bits first."""
    per_word = 32 // bits
    words = codes.to(torch.int64).reshape(*codes.shape[:-1], -1, per_word)
    if order is not None:
        words = words[..., list(order)]
    packed = sum(words[..., place] << (bits * place) for place in range(per_word))
    assert isinstance(packed, Tensor)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack(packed: Tensor, *, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The inverse of :func:`pack`, one place after the other."""
    per_word = 32 // bits
    places = [(packed.to(torch.int64) >> (bits * place)) & (2**bits - 1) for place in range(per_word)]
    if order is not None:
        places = [places[order.index(place)] for place in range(per_word)]
    return torch.stack(places, -1).reshape(*packed.shape[:-1], -1)


# FP8 --------------------------------------------------------------------------------------------------------------


def block_maxima(weight: Tensor) -> Tensor:
    """The largest |weight| of each square of :data:`BLOCK`; leading axes are kept."""
    *lead, rows, columns = weight.shape
    squares = weight.abs().reshape(*lead, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    return squares.amax((-3, -1))


def _to_f8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).clamp(-F8_MAX, F8_MAX).to(F8)


def encode_block(weight: Tensor) -> Parts:
    """DeepSeek-V3's FP8: one float32 scale for each square of weights."""
    scale = block_maxima(weight) / F8_MAX
    return {"weight": _to_f8(weight, spread(scale, weight.shape)), "weight_scale_inv": scale}


def decode_block(parts: Parts) -> Tensor:
    """The weight of :func:`encode_block`."""
    return parts["weight"].float() * spread(parts["weight_scale_inv"], parts["weight"].shape)


def encode_per_tensor(scale_name: str, input_name: str | None, shape: tuple[int, ...]) -> Callable[[Tensor], Parts]:
    def encode(weight: Tensor) -> Parts:
        scale = weight.abs().max() / F8_MAX
        parts = {"weight": _to_f8(weight, scale), scale_name: scale.reshape(shape)}
        return parts | ({input_name: (weight.abs().mean() / F8_MAX).reshape(shape)} if input_name else {})

    return encode


def encode_per_channel(weight: Tensor) -> Parts:
    scale = weight.abs().amax(1, keepdim=True) / F8_MAX
    return {"weight": _to_f8(weight, scale), "weight_scale": scale}


# Integers ---------------------------------------------------------------------------------------------------------


def _affine(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes 0 to 15, scales, zero points) with a scale for each :data:`GROUP` columns of a row."""
    grouped = weight.reshape(weight.shape[0], -1, GROUP)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    codes = (weight / spread(scale, weight.shape) + spread(zero, weight.shape)).round().clamp(0, 15)
    return codes.long(), scale, zero.long()


def encode_gptq(weight: Tensor) -> Parts:
    """GPTQ version 1: input dimension packed, zero points stored minus one."""
    codes, scale, zero = _affine(weight)
    zero = zero.clamp(min=1)
    codes = (weight / spread(scale, weight.shape) + spread(zero.float(), weight.shape)).round().clamp(0, 15).long()
    return {
        "qweight": pack(codes, bits=4).T.contiguous(),
        "qzeros": pack((zero - 1).T.contiguous(), bits=4),
        "scales": scale.T.contiguous().half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def decode_gptq(parts: Parts) -> Tensor:
    """The weight of :func:`encode_gptq`, row by row of the input dimension."""
    codes = unpack(parts["qweight"].T.contiguous(), bits=4).T
    zeros = unpack(parts["qzeros"], bits=4) + 1
    rows = [
        (codes[i] - zeros[group]) * parts["scales"][group].float() for i, group in enumerate(parts["g_idx"].tolist())
    ]
    return torch.stack(rows).T


def encode_awq(weight: Tensor) -> Parts:
    """AWQ's gemm layout: output dimension packed, in an order of its own."""
    codes, scale, zero = _affine(weight)
    return {
        "qweight": pack(codes.T.contiguous(), bits=4, order=AWQ_ORDER),
        "qzeros": pack(zero.T.contiguous(), bits=4, order=AWQ_ORDER),
        "scales": scale.T.contiguous().half(),
    }


def decode_awq(parts: Parts) -> Tensor:
    """The weight of :func:`encode_awq`."""
    codes = unpack(parts["qweight"], bits=4, order=AWQ_ORDER)
    zeros = unpack(parts["qzeros"], bits=4, order=AWQ_ORDER).repeat_interleave(GROUP, 0)
    return ((codes - zeros) * parts["scales"].float().repeat_interleave(GROUP, 0)).T


def encode_int4(weight: Tensor) -> Parts:
    """compressed-tensors pack-quantized: -8 to 7 stored plus 8."""
    scale = weight.reshape(weight.shape[0], -1, GROUP).abs().amax(-1) / 7.5
    codes = (weight / spread(scale, weight.shape)).round().clamp(-8, 7)
    return {
        "weight_packed": pack(codes.long() + 8, bits=4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def decode_int4(parts: Parts) -> Tensor:
    """The weight of :func:`encode_int4`."""
    codes = unpack(parts["weight_packed"], bits=4) - 8
    assert list(codes.shape) == parts["weight_shape"].tolist()
    return codes * spread(parts["weight_scale"], codes.shape)


def encode_int4_asymmetric(weight: Tensor) -> Parts:
    """compressed-tensors pack-quantized with zero points, packed along the rows, and a group index."""
    codes, scale, zero = _affine(weight)
    return {
        "weight_packed": pack(codes, bits=4),
        "weight_scale": scale,
        "weight_zero_point": pack(zero.T.contiguous(), bits=4).T.contiguous(),
        "weight_g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def decode_int4_asymmetric(parts: Parts) -> Tensor:
    """The weight of :func:`encode_int4_asymmetric`."""
    codes = unpack(parts["weight_packed"], bits=4)
    zeros = unpack(parts["weight_zero_point"].T.contiguous(), bits=4).T
    group = parts["weight_g_idx"].long()
    return (codes - zeros[:, group]) * parts["weight_scale"][:, group]


def encode_int8(weight: Tensor) -> Parts:
    """bitsandbytes LLM.int8(): SCB is the largest |weight| of a row."""
    largest = weight.abs().amax(1)
    return {
        "weight": (weight / largest[:, None] * 127).round().to(torch.int8),
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


# Four-bit floats --------------------------------------------------------------------------------------------------


def _pack_nibbles(codes: Tensor) -> Tensor:
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Two codes a byte, low bits first."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()


def _nvfp4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(packed, scale of each group in FP8, scale of the tensor) with weight = value * scale / tensor scale."""
    tensor_scale = F8_MAX * 6 / weight.abs().max()
    scale = (weight.reshape(weight.shape[0], -1, group).abs().amax(-1) / 6 * tensor_scale).to(F8)
    codes = nearest(weight / spread(scale.float() / tensor_scale, weight.shape), E2M1)
    return _pack_nibbles(codes), scale, tensor_scale


def encode_nvfp4(weight: Tensor) -> Parts:
    """compressed-tensors nvfp4-pack-quantized: the global scale divides."""
    packed, scale, tensor_scale = _nvfp4(weight, 8)
    return {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_global_scale": tensor_scale.reshape(1),
        "input_global_scale": (1 / weight.abs().mean()).reshape(1),
    }


def decode_nvfp4(parts: Parts) -> Tensor:
    """The weight of :func:`encode_nvfp4`."""
    values = E2M1[unpack_nibbles(parts["weight_packed"])]
    return values * spread(parts["weight_scale"].float() / parts["weight_global_scale"], values.shape)


def encode_modelopt(weight: Tensor) -> Parts:
    """ModelOpt NVFP4: `weight_scale_2` multiplies; its two scales of a whole tensor have no axis."""
    packed, scale, tensor_scale = _nvfp4(weight, 8)
    return {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": 1 / tensor_scale,
        "input_scale": weight.abs().mean() / 6,
    }


def decode_modelopt(parts: Parts) -> Tensor:
    """The weight of :func:`encode_modelopt`."""
    values = E2M1[unpack_nibbles(parts["weight"])]
    return values * spread(parts["weight_scale"].float() * parts["weight_scale_2"], values.shape)


def encode_nf4(weight: Tensor) -> Parts:
    """bitsandbytes NF4 with double quantisation; the first code of a byte is in its high bits."""
    flat = weight.reshape(-1, 64)
    absmax = flat.abs().amax(1)
    codes = nearest(flat / absmax[:, None], NF4).flatten()
    offset = absmax.mean()
    nested = (absmax - offset).abs().max()
    table = torch.linspace(-1, 1, 256)
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape),
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item(),
    }  # fmt: skip
    return {
        "weight": (codes[0::2] << 4 | codes[1::2]).to(torch.uint8).unsqueeze(1),
        "weight.absmax": nearest((absmax - offset) / nested, table).to(torch.uint8),
        "weight.quant_map": NF4,
        "weight.nested_absmax": nested.reshape(1),
        "weight.nested_quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def decode_nf4(parts: Parts) -> Tensor:
    """The weight of :func:`encode_nf4`."""
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    absmax = parts["weight.nested_quant_map"][parts["weight.absmax"].long()] * parts["weight.nested_absmax"]
    packed = parts["weight"].flatten()
    values = parts["weight.quant_map"][torch.stack([packed >> 4, packed & 15], -1).flatten().long()]
    return (values.reshape(-1, 64) * (absmax + state["nested_offset"])[:, None]).reshape(state["shape"])


def encode_mxfp4(weight: Tensor) -> Parts:
    """MXFP4 along the last axis: 32 values in 16 bytes, and one power of two, stored plus 127."""
    grouped = weight.reshape(*weight.shape[:-1], -1, 32)
    exponent = (grouped.abs().amax(-1) / 6).log2().ceil()
    codes = nearest(grouped / exponent.exp2().unsqueeze(-1), E2M1)
    return {"blocks": _pack_nibbles(codes), "scales": (exponent + 127).to(torch.uint8)}


def decode_mxfp4(parts: Parts) -> Tensor:
    """The weight of :func:`encode_mxfp4`."""
    values = E2M1[unpack_nibbles(parts["blocks"])]
    return (values * (parts["scales"].float() - 127).exp2().unsqueeze(-1)).flatten(-2)
