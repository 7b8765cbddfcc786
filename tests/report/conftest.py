"""Facts of a run that never happened, shaped like those of a real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

DOMAINS = ("python", "javascript", "sql", "math", "medicine", "law", "german", "news")
BASE_BPB = {"python": 1.12, "javascript": 1.21, "sql": 0.94, "math": 1.38, "medicine": 1.55, "law": 1.41}
# name: (experts kept of 64, top-k, score, mean loss increase in bits per byte)
CUTS: dict[str, tuple[float, int, str | None, float]] = {
    "topk-6": (1.0, 6, None, 0.004),
    "topk-4": (1.0, 4, None, 0.031),
    "reap-75": (0.75, 8, "reap", 0.012),
    "random-75": (0.75, 8, "random", 0.14),
    "reap-50": (0.5, 8, "reap", 0.075),
    "random-50": (0.5, 8, "random", 0.46),
    "reap-75-topk-6": (0.75, 6, "reap", 0.019),
}


def build(
    *,
    layers: int = 5,
    experts: int = 64,
    top_k: int = 8,
    domains: tuple[str, ...] = DOMAINS,
    cuts: dict[str, tuple[float, int, str | None, float]] | None = None,
    cliff: tuple[str, str] | None = ("reap-50", "sql"),
    seed: int = 0,
) -> dict[str, Any]:
    """A full set of facts; sections can then be deleted from it."""
    rng = np.random.default_rng(seed)
    cuts = CUTS if cuts is None else cuts
    router, saliency = make_router(rng, layers=layers, experts=experts, domains=domains)
    variants = [make_variant(rng, "original", (1.0, top_k, None, 0.0), experts, domains, None, top_k)]
    for name, cut in cuts.items():
        fallen = cliff[1] if cliff is not None and cliff[0] == name else None
        variants.append(make_variant(rng, name, cut, experts, domains, fallen, top_k, variants[0]))
        if cut[0] < 1.0:
            add_plan(rng, router, saliency, name, round(cut[0] * experts), cut[2])
    exported = variants[-1]
    exported["exported"] = True
    exported["warnings"] = ["layer 4 drops the expert that 31 % of the sql tokens used most"]
    return {
        "format": 1,
        "title": "quickstart",
        "model": {
            "name": "moeprune demo",
            "source": "moeprune/demo/model",
            "model_type": "qwen3_moe",
            "num_layers": layers,
            "num_moe_layers": layers,
            "num_experts": experts,
            "top_k": top_k,
            "router": "softmax before top-k, renormalised",
        },
        "calibration": {"tokens": 32768 * len(domains), "domains": dict.fromkeys(domains, 32768), "seconds": 12.3},
        "baseline": "original",
        "variants": variants,
        "router": router,
        "verify": {
            "passed": True,
            "checks": [
                {"name": "strict reload", "passed": True, "detail": "no missing, no unexpected keys"},
                {
                    "name": "logits equal the plan in memory",
                    "passed": True,
                    "detail": "512 tokens, largest difference 0",
                },
                {"name": "config counts", "passed": True, "detail": "num_experts 48, num_experts_per_tok 6"},
            ],
        },
        "recipe_yaml": "model: moeprune/demo/model\nplans:\n  - {score: reap, keep: 0.75, top_k: 6}\n",
        "command": "moeprune run recipes/quickstart.yaml --out runs/quickstart",
        "environment": {"moeprune": "0.1.0", "torch": "2.8.0", "transformers": "5.20.0", "python": "3.11.9"},
        "seconds": {"calibrate": 12.3, "plan": 0.2, "evaluate": 90.2, "export": 1.1},
    }


def make_router(
    rng: np.random.Generator, *, layers: int, experts: int, domains: tuple[str, ...]
) -> tuple[dict[str, Any], np.ndarray]:
    base = rng.normal(0.0, 0.9, (layers, experts))
    taste = rng.normal(0.0, 1.0, (len(domains), layers, experts)) ** 2
    by_domain = np.exp(base + taste * np.linspace(0.3, 1.1, layers)[:, None])
    by_domain /= by_domain.sum(axis=2, keepdims=True)
    load = by_domain.mean(axis=0)
    saliency = np.exp(0.6 * np.log(load * experts) + rng.normal(0.0, 0.5, load.shape)) * (
        1 + np.arange(layers)[:, None]
    )
    entropy = -(load * np.log(load)).sum(axis=1) / np.log(experts)
    router = {
        "layers": [f"model.layers.{i}" for i in range(layers)],
        "domains": list(domains),
        "load": load.tolist(),
        "load_by_domain": {name: by_domain[i].tolist() for i, name in enumerate(domains)},
        "entropy": entropy.tolist(),
        "saliency": {"score": "reap", "values": saliency.tolist()},
        "kept": {},
        "after": {},
    }
    return router, saliency


def add_plan(
    rng: np.random.Generator, router: dict[str, Any], saliency: np.ndarray, name: str, count: int, score: str | None
) -> None:
    worth = rng.random(saliency.shape) if score == "random" else saliency
    kept = np.sort(np.argsort(-worth, axis=1)[:, :count], axis=1)
    after = np.take_along_axis(np.array(router["load"]), kept, axis=1)
    router["kept"][name] = kept.tolist()
    router["after"][name] = (after / after.sum(axis=1, keepdims=True)).tolist()


def make_variant(
    rng: np.random.Generator,
    name: str,
    cut: tuple[float, int, str | None, float],
    experts: int,
    domains: tuple[str, ...],
    fallen: str | None,
    full_top_k: int,
    original: dict[str, Any] | None = None,
) -> dict[str, Any]:
    keep, top_k, score, rise = cut
    count, dense, expert = round(keep * experts), 420_000, 63_000
    results: dict[str, Any] = {}
    for domain in domains:
        change = rise * rng.uniform(0.7, 1.3) * (4.0 if domain == fallen else 1.0)
        error = 0.002 + 0.06 * rise
        results[f"offline_bpb_{domain}"] = _result(
            "bits_per_byte", BASE_BPB.get(domain, 1.3) + change, 0.03, 50, False, error
        )
    for i, domain in enumerate(domains):
        results[f"offline_choice_{domain}"] = _result(
            "acc", 0.71 - 0.02 * i - 0.4 * rise + rng.normal(0, 0.004), 0.026, 300, True, 0.011
        )
    results["offline_arithmetic"] = _result(
        "exact_match", 0.62 - 0.9 * rise + rng.normal(0, 0.003), 0.024, 400, True, 0.013
    )
    groups = {
        group: _mean(results, [f"{group}_{domain}" for domain in domains])
        for group in ("offline_choice", "offline_bpb")
    }
    variant: dict[str, Any] = {
        "name": name,
        "num_experts": count,
        "top_k": top_k,
        "score": score,
        "keep": keep,
        "parameters": dense + count * expert,
        "active_parameters": dense + top_k * expert,
        "bytes": 2 * (dense + count * expert),
        "throughput": _throughput(rng, top_k / full_top_k),
        "exported": False,
        "warnings": [],
    }
    errors = {key: value.pop("_paired") for key, value in {**results, **groups}.items()}
    variant |= {"results": results, "groups": groups}
    if original is not None:
        reference = {**original["results"], **original["groups"]}
        variant["paired"] = {
            key: {"difference": value["value"] - reference[key]["value"], "stderr": errors[key], "n": value["n"]}
            for key, value in {**results, **groups}.items()
        }
    return variant


def _result(metric: str, value: float, stderr: float, n: int, higher: bool, paired: float) -> dict[str, Any]:
    return {"metric": metric, "value": value, "stderr": stderr, "n": n, "higher_is_better": higher, "_paired": paired}


def _mean(results: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    parts, root = [results[task] for task in tasks], len(tasks) ** 0.5
    mean = {key: float(np.mean([part[key] for part in parts])) for key in ("value", "stderr", "_paired")}
    whole = _result(
        parts[0]["metric"],
        mean["value"],
        mean["stderr"] / root,
        sum(part["n"] for part in parts),
        parts[0]["higher_is_better"],
        mean["_paired"] / root,
    )
    return whole | {"tasks": tasks}


def _throughput(rng: np.random.Generator, share: float) -> dict[str, Any]:
    def spread(middle: float) -> dict[str, Any]:
        return {"median": middle, "min": middle * 0.96, "max": middle * 1.03, "n": 5}

    load = {"engine": "transformers", "device": "cpu", "dtype": "bfloat16", "batch": 8}
    return load | {
        "prompt_tokens": 128,
        "new_tokens": 32,
        "prefill_tokens_per_second": spread(2600 / (0.4 + 0.6 * share) + rng.normal(0, 20)),
        "decode_tokens_per_second": spread(310 / (0.4 + 0.6 * share) + rng.normal(0, 3)),
    }


@pytest.fixture(name="make_facts", scope="session")
def _make_facts() -> Callable[..., dict[str, Any]]:
    return build
