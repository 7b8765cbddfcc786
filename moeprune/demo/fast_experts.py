"""A cache-friendly experts implementation for training small MoE models on a CPU.

The stock `grouped_mm` path materialises every routed copy of every token, which for tiny experts spends most of the
time moving memory. Here one expert at a time gathers its tokens, works on them while they are in cache, and adds its
result back, with a hand-written backward that recomputes the activation instead of storing it.
"""

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ExpertsInterface

NAME = "moeprune_demo_cpu"


def _group(indices, num_experts):
    """Sorts routed slots by expert: token of each slot, slot order, and the slice bounds of each expert."""
    flat = indices.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=num_experts).cumsum(0).tolist()
    return order // indices.shape[1], order, list(zip([0, *ends[:-1]], ends, strict=True))


class _Experts(torch.autograd.Function):
    """out[t] = sum over k of w[t, k] * down_e(silu(gate_e(x[t])) * up_e(x[t])), for e = indices[t, k]."""

    @staticmethod
    def forward(ctx, x, indices, weights, gate_up, down):
        token, order, spans = _group(indices, gate_up.shape[0])
        slot_weight = weights.reshape(-1)[order]
        out = torch.zeros_like(x)
        hidden = []
        for e, (a, b) in enumerate(spans):
            h = x.index_select(0, token[a:b]) @ gate_up[e].T
            gate, up = h.chunk(2, dim=-1)
            act = F.silu(gate).mul_(up).mul_(slot_weight[a:b, None])
            out.index_add_(0, token[a:b], act @ down[e].T)
            hidden.append(h)
        ctx.save_for_backward(x, token, order, slot_weight, gate_up, down, *hidden)
        ctx.spans = spans
        ctx.slots = weights.shape
        return out

    @staticmethod
    def backward(ctx, grad_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, token, order, slot_weight, gate_up, down, *hidden = ctx.saved_tensors
        grad_x = torch.zeros_like(x)
        grad_slot = torch.empty_like(slot_weight)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        for e, (a, b) in enumerate(ctx.spans):
            rows, w = token[a:b], slot_weight[a:b, None]
            gate, up = hidden[e].chunk(2, dim=-1)
            sigmoid = torch.sigmoid(gate)
            silu = gate * sigmoid
            act = silu * up
            grad_y = grad_out.index_select(0, rows)
            grad_act = grad_y @ down[e]
            grad_slot[a:b] = (grad_act * act).sum(-1)
            torch.mm(grad_y.T, act.mul_(w), out=grad_down[e])
            grad_act.mul_(w)
            grad_h = torch.empty_like(hidden[e])
            # d silu(g) / dg = s + silu(g) * (1 - s)
            half = gate.shape[1]
            torch.mul(grad_act, silu, out=grad_h[:, half:])
            torch.mul(grad_act.mul_(up), sigmoid + silu * (1 - sigmoid), out=grad_h[:, :half])
            torch.mm(grad_h.T, x.index_select(0, rows), out=grad_gate_up[e])
            grad_x.index_add_(0, rows, grad_h @ gate_up[e])
        grad_weights = torch.empty_like(slot_weight).index_copy_(0, order, grad_slot).view(ctx.slots)
        return grad_x, None, grad_weights, grad_gate_up, grad_down


def cpu_experts(module, hidden_states, top_k_index, top_k_weights):
    """Experts forward in the signature that transformers' experts interface expects; runs in float32."""
    with torch.autocast("cpu", enabled=False):
        return _Experts.apply(
            hidden_states.float(), top_k_index, top_k_weights.float(), module.gate_up_proj, module.down_proj
        )


def register():
    """Makes the implementation available as `model.set_experts_implementation(NAME)`; returns NAME."""
    ExpertsInterface.register(NAME, cpu_experts)
    return NAME
