"""Measures the demo model: `python -m moeprune.demo.measure`, from the repository root, prints the card's figures.

Held-out bits per byte, choice and arithmetic accuracy come from lm-eval with the tasks of `eval/offline`; routing
figures come from one pass over the same held-out documents.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeprune.anatomy.sizes import measure_sizes
from moeprune.anatomy.source import open_source
from moeprune.demo import MODEL_DIR
from moeprune.demo.ngram import RESULT as NGRAM
from moeprune.demo.ngram import heldout_texts
from moeprune.evaluate import evaluate_model
from moeprune.resources import shipped

PROMPTS = {
    "python": "def add(self, node):\n    ",
    "english": "To use this setting, you",
    "json": ' "ListTagsForResource": {\n  "name":',
    "scripture": "And the LORD said unto Moses,",
    "c": "static int\nuv__read(",
    "german": "Möchtest du",
    "web": '<div class="',
    "arithmetic": "37+48=",
}


def sizes(folder):
    """Parameters, parameters active for a token, and bytes of the files in a checkpoint folder."""
    source = open_source(folder)
    found = measure_sizes(source.anatomy, source.checkpoint.tensors)
    files = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir()) if path.is_file()}
    return {
        "parameters": found.total(),
        "active_parameters": found.active(),
        "bytes": sum(files.values()),
        "files": files,
    }


@torch.no_grad()
def expert_loads(model, *, tokenizer, texts):
    """How often each expert was chosen.

    Args:
        model: a model of the demo's class.
        tokenizer: its tokenizer.
        texts: dict domain -> list of texts.

    Returns:
        Float64 tensor [domains, layers, experts]; each [domain, layer] row sums to one.
    """
    layers = model.model.layers
    loads = torch.zeros(len(texts), len(layers), model.config.num_experts, dtype=torch.float64)
    chosen = {}

    def keep(layer):
        def hook(_module, _inputs, output):
            chosen[layer] = output[2]

        return hook

    hooks = [layer.mlp.gate.register_forward_hook(keep(i)) for i, layer in enumerate(layers)]
    for domain, documents in enumerate(texts.values()):
        for text in documents:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            model(torch.tensor([[tokenizer.bos_token_id, *ids]]), use_cache=False)
            for layer, indices in chosen.items():
                loads[domain, layer] += torch.bincount(indices.reshape(-1), minlength=loads.shape[-1])
    for hook in hooks:
        hook.remove()
    return loads / loads.sum(-1, keepdim=True)


def routing_figures(loads):
    """Balance and specialisation of each layer, every domain weighing the same.

    Args:
        loads: float64 tensor [domains, layers, experts] as `expert_loads` returns it.

    Returns:
        Dict of lists over layers: `load_entropy` (1 is perfectly balanced), `largest_load` and `smallest_load` (times
        the average), `domain_information` (mutual information of expert and domain, bits, at most log2 of the number
        of domains), `specialised` (share of experts whose load in their best domain is over twice their average).
    """
    num_experts = loads.shape[-1]
    mean = loads.mean(0)
    entropy = -(mean * mean.clamp_min(1e-300).log2()).sum(-1)
    information = (loads * (loads / mean).clamp_min(1e-300).log2()).nan_to_num().sum(-1).mean(0)
    specialised = (loads.amax(0) > 2 * mean).double().mean(-1)
    figures = {
        "load_entropy": entropy / math.log2(num_experts),
        "largest_load": mean.amax(-1) * num_experts,
        "smallest_load": mean.amin(-1) * num_experts,
        "domain_information": information,
        "specialised": specialised,
    }
    return {name: [round(v, 3) for v in values.tolist()] for name, values in figures.items()}


def top_experts(loads, *, domains, layer, count=4):
    """The experts a domain uses most in one layer: dict domain -> list of (expert, times the uniform load)."""
    best = (loads[:, layer] * loads.shape[-1]).topk(count)
    pairs = [list(zip(i.tolist(), [round(v, 1) for v in x.tolist()], strict=True)) for x, i in zip(*best, strict=True)]
    return dict(zip(domains, pairs, strict=True))


def lm_eval_figures(model, *, tokenizer):
    """Runs the offline tasks through lm-eval: dict task or group -> {metric: value, "stderr": value}."""
    result = evaluate_model(
        model,
        tokenizer=tokenizer,
        tasks=["offline"],
        include_path=shipped("eval") / "offline",
        limit=None,
        batch_size=16,
        seed=0,
        name="demo",
        quiet=True,
    )
    scores = {**result.tasks, **result.groups}
    return {name: {score.metric: score.value, "stderr": score.stderr} for name, score in scores.items()}


@torch.no_grad()
def samples(model, *, tokenizer, tokens=60):
    """A sampled continuation (temperature 0.7, top-p 0.9) of one prompt a domain: dict domain -> prompt and text."""
    texts = {}
    for domain, prompt in PROMPTS.items():
        torch.manual_seed(0)
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=domain != "arithmetic",
            temperature=0.7,
            top_p=0.9,
            max_new_tokens=tokens,
        )
        texts[domain] = tokenizer.decode(output[0], skip_special_tokens=True)
    return texts


def table(report):
    """The report's figures of each domain as Markdown rows: bits per byte of model and n-gram, choice accuracy."""
    lines = ["| domain | model | n-gram | ratio | choice |", "| --- | ---: | ---: | ---: | ---: |"]
    for domain, baseline in report["ngram"].items():
        bpb = report["lm_eval"][f"offline_bpb_{domain}"]["bits_per_byte"]
        choice = report["lm_eval"].get(f"offline_choice_{domain}", {}).get("acc")
        accuracy = "" if choice is None else f"{choice:.3f}"
        lines.append(f"| {domain} | {bpb:.3f} | {baseline:.3f} | {bpb / baseline:.2f} | {accuracy} |")
    return "\n".join(lines)


def main():
    """Command line of `python -m moeprune.demo.measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR), help="checkpoint folder")
    parser.add_argument("--skip-lm-eval", action="store_true", help="only sizes, routing and samples")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts = heldout_texts()
    loads = expert_loads(model, tokenizer=tokenizer, texts=texts)
    report = {
        "sizes": sizes(args.model),
        "routing": routing_figures(loads),
        "top_experts_last_layer": top_experts(loads, domains=texts, layer=-1),
        "samples": samples(model, tokenizer=tokenizer),
    }
    if NGRAM.exists():
        report["ngram"] = json.loads(NGRAM.read_text())["best"]
    if not args.skip_lm_eval:
        report["lm_eval"] = lm_eval_figures(model, tokenizer=tokenizer)
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if "ngram" in report and "lm_eval" in report:
        print(table(report))


if __name__ == "__main__":
    main()
