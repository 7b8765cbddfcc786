"""Trains the demo model on a CPU: `python -m moeprune.demo.train --cache DIR --out DIR`.

The run is reproducible for one number of processes, saves itself every few minutes, and goes on from the last save when
it is started again. The schedule is counted in tokens; another `--tokens` on resume re-plans what is left of it.
"""

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeprune.demo import fast_experts
from moeprune.demo.corpus import DOMAINS, build
from moeprune.demo.data import Batches, prepare
from moeprune.demo.muon import Muon
from moeprune.demo.sources import fetch
from moeprune.demo.tokenizer import train_tokenizer

# window length until this share of the tokens: attention over short windows is cheap, and most of what is learnt early
# is local; the last phase makes the model use every position that its configuration promises
PHASES = ((0.78, 256), (0.96, 512), (1.0, 1024))
WARMUP_TOKENS = 500_000
FINAL_LR = 0.02


def config():
    """The demo model's configuration: 5 layers of 64 experts, 8 active, about 4.5 million parameters."""
    return Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=5,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=32,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # pyright: ignore[reportCallIssue]
        tie_word_embeddings=True,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        mlp_only_layers=[],
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


class RouterProbe:
    """Collects every router's logits during a forward, for the balance loss."""

    def __init__(self, model):
        self.logits, self.chosen = [], []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._keep)

    def _keep(self, _module, _inputs, output):
        self.logits.append(output[0])
        self.chosen.append(output[2])

    def balance_loss(self):
        """Mean over layers of E * sum_e share_e * probability_e (Switch Transformer, eq. 4); its minimum is top-k."""
        total = 0.0
        for logits, chosen in zip(self.logits, self.chosen, strict=True):
            num_experts = logits.shape[-1]
            share = torch.bincount(chosen.reshape(-1), minlength=num_experts) / len(chosen)
            total = total + num_experts * (share * logits.float().softmax(-1).mean(0)).sum()
        loss = total / len(self.logits)
        self.logits, self.chosen = [], []
        return loss


def learning_rate(done, *, total, peak):
    """Linear warm-up, then a cosine to a fiftieth of the peak; all in tokens."""
    if done < WARMUP_TOKENS:
        return peak * (done + 1) / WARMUP_TOKENS
    progress = min(1.0, (done - WARMUP_TOKENS) / max(1, total - WARMUP_TOKENS))
    return peak * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizers(model, *, peak):
    """Muon for the matrices inside the layers; AdamW for embeddings, routers and norms, which are not mere matrices."""
    muon, decayed, plain = [], [], []
    for name, p in model.named_parameters():
        if p.ndim == 1:
            plain.append(p)
        elif "embed" in name or "gate.weight" in name:
            decayed.append(p)
        else:
            muon.append(p)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return Muon(muon, lr=peak), torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


def train_step(model, batch, *, probe, balance):
    """One forward and backward; returns the language-model loss and the balance loss as floats."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
    penalty = probe.balance_loss()
    (loss + balance * penalty).backward()
    return loss.item(), penalty.item()


def average_gradients(model, *, processes):
    """Averages gradients over the processes, in one message."""
    if processes == 1:
        return
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= processes
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def save(state, *, model, tokenizer, out):
    """Writes the resumable state and, beside it, a bfloat16 checkpoint folder `latest`; each replaces the old whole."""
    temporary = out / "state.new.pt"
    torch.save(state, temporary)
    temporary.replace(out / "state.pt")
    folder, new = out / "latest", out / ".latest"
    shutil.rmtree(new, ignore_errors=True)
    export = Qwen3MoeForCausalLM(config())
    export.load_state_dict(model.state_dict())
    export.bfloat16().save_pretrained(new)
    tokenizer.save_pretrained(new)
    # the weights file is written readable by its owner only, which an installed wheel would keep
    (new / "model.safetensors").chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    new.replace(folder)


class Run:
    """A training run of one process: model, optimiser, position in the schedule."""

    def __init__(self, args, *, rank):
        torch.manual_seed(args.seed)
        self.args, self.rank, self.out = args, rank, Path(args.out)
        self.model = Qwen3MoeForCausalLM(config())
        self.model.set_experts_implementation(fast_experts.register())
        # PyTorch's fused attention is slower than the plain products on a CPU at this size
        self.model.set_attn_implementation("eager")
        self.optimizers = make_optimizers(self.model, peak=args.lr)
        self.probe = RouterProbe(self.model)
        self.batches = Batches(self.out, domains=DOMAINS, seed=args.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(self.out / "tokenizer")
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        if (self.out / "state.pt").exists():
            self._resume()

    def _resume(self):
        state = torch.load(self.out / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]

    def advance(self):
        """Does one optimiser step; returns (loss, balance loss, tokens per second)."""
        began = time.monotonic()
        length = next((n for share, n in PHASES if self.tokens < share * self.args.tokens), PHASES[-1][1])
        rows = max(len(DOMAINS), self.args.tokens_per_process // length)
        drawn = self.batches.draw(self.step, rank=self.rank, rows=rows, length=length, end_id=0)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(self.tokens, total=self.args.tokens, peak=self.args.lr)
        self.model.zero_grad(set_to_none=True)
        losses = train_step(self.model, torch.from_numpy(drawn), probe=self.probe, balance=self.args.balance)
        average_gradients(self.model, processes=self.args.processes)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.tokens += rows * length * self.args.processes
        elapsed = time.monotonic() - began
        self.seconds += elapsed
        return *losses, rows * length * self.args.processes / elapsed

    def save(self):
        """Saves the run; call on one process only."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        save(state, model=self.model, tokenizer=self.tokenizer, out=self.out)

    def loop(self):
        """Trains until the planned number of tokens, logging and saving on the way."""
        saved = time.monotonic()
        while self.tokens < self.args.tokens:
            loss, penalty, speed = self.advance()
            if self.rank == 0 and self.step % 20 == 0:
                row = {"step": self.step, "tokens": self.tokens, "loss": round(loss, 4), "balance": round(penalty, 3)}
                row |= {"tokens_per_second": int(speed), "minutes": round(self.seconds / 60, 1)}
                print(json.dumps(row), flush=True)
            if self.rank == 0 and time.monotonic() - saved > 60 * self.args.save_minutes:
                self.save()
                saved = time.monotonic()
        if self.rank == 0:
            self.save()


def _worker(rank, args):
    torch.set_num_threads(1)
    if args.processes > 1:
        meeting = f"file://{Path(args.out).resolve() / f'rendezvous-{os.getppid()}'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)
    Run(args, rank=rank).loop()
    if args.processes > 1:
        dist.destroy_process_group()


def _prepare(args):
    out = Path(args.out)
    if (out / "tokenizer").exists():
        return
    fetch(args.cache)
    corpus = build(args.cache)
    tokenizer = train_tokenizer(corpus)
    prepare(corpus, tokenizer=tokenizer, out=out)
    # written last: its presence says that the streams are complete
    tokenizer.save_pretrained(out / ".tokenizer")
    (out / ".tokenizer").replace(out / "tokenizer")


def main():
    """Command line of `python -m moeprune.demo.train`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="folder for the downloaded packages")
    parser.add_argument("--out", required=True, help="folder for the state, the log and the checkpoint")
    parser.add_argument("--tokens", type=int, default=27_000_000, help="tokens to train on, all processes together")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--tokens-per-process", type=int, default=2048, help="tokens of one process in one step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--balance", type=float, default=0.005, help="weight of the routers' balance loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-minutes", type=float, default=4)
    args = parser.parse_args()
    _prepare(args)
    spawn(_worker, args=(args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
