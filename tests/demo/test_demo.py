"""The embedded model, its calibration text and the offline evaluation sets: whole, disjoint, and worth pruning."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeprune import demo
from moeprune.demo import arithmetic, corpus
from moeprune.demo.split import SPLITS, split_of

DATA = Path(__file__).parents[2] / "eval" / "offline" / "data"
DOMAINS = tuple(demo.CALIBRATION)
CHOICE_DOMAINS = tuple(d for d in DOMAINS if d != "arithmetic")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exercises(texts):
    return {line for text in texts for line in text.splitlines()}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    # so small a model loses more to the meeting of threads than it gains
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


def test_import_loads_no_torch():
    code = "import sys, moeprune.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_model_is_a_small_fine_grained_moe(model):
    assert model.config.model_type == "qwen3_moe"
    assert model.config.num_experts >= 32
    assert model.config.num_experts_per_tok < model.config.num_experts // 4
    assert sum(p.stat().st_size for p in demo.MODEL_DIR.iterdir()) <= 10_000_000
    assert sum(p.stat().st_size for p in demo.CALIBRATION.values()) <= 700_000
    assert sum(p.stat().st_size for p in DATA.iterdir()) <= 3_000_000


def test_heldout_text_costs_fewer_bits_than_with_the_ngram_baseline(model, tokenizer):
    recorded = json.loads((Path(demo.__file__).parent / "ngram.json").read_text())["best"]
    # all documents, as the recorded figure is over all of them; four domains, to be quick
    for domain in ("python", "json", "german", "arithmetic"):
        texts = [row["text"] for row in rows(DATA / f"bpb_{domain}.jsonl")]
        assert heldout_bits_per_byte(model, tokenizer, texts) < 0.9 * recorded[domain], domain


@torch.no_grad()
def heldout_bits_per_byte(model, tokenizer, texts):
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        logits = model(ids, use_cache=False).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_every_expert_is_used_and_domains_differ(model, tokenizer):
    from moeprune.demo.measure import expert_loads, routing_figures

    texts = {d: [row["text"] for row in rows(DATA / f"bpb_{d}.jsonl")[:5]] for d in DOMAINS}
    figures = routing_figures(expert_loads(model, tokenizer=tokenizer, texts=texts))
    assert min(figures["load_entropy"]) > 0.9
    assert min(figures["smallest_load"]) > 0.05
    assert max(figures["domain_information"]) > 0.1


@pytest.mark.parametrize("domain", DOMAINS)
def test_tokenizer_gives_the_text_back(tokenizer, domain):
    for row in rows(DATA / f"bpb_{domain}.jsonl"):
        assert tokenizer.decode(tokenizer(row["text"])["input_ids"]) == row["text"]


def test_tokenizer_takes_digits_one_by_one(tokenizer):
    assert [t.lstrip("Ġ") for t in tokenizer.tokenize("1234 56")] == list("123456")
    assert len(tokenizer) == 2048
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_chat_template_renders(tokenizer):
    chat = [{"role": "user", "content": "37+48="}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "user: 37+48=\nassistant: "


@pytest.mark.parametrize("domain", CHOICE_DOMAINS)
def test_choice_items_have_four_choices_and_one_right_answer(tokenizer, domain):
    items = rows(DATA / f"choice_{domain}.jsonl")
    assert len(items) >= 150
    for item in items:
        choices = item["choices"]
        assert len(set(choices)) == len(choices) == 4
        assert 0 <= item["answer"] < 4
        lengths = [len(c.encode()) for c in choices]
        assert max(lengths) <= 2 * min(lengths)
    positions = [item["answer"] for item in items]
    assert max(positions.count(i) for i in range(4)) < 0.4 * len(items)


@pytest.mark.parametrize("domain", CHOICE_DOMAINS)
def test_choice_boundary_does_not_split_a_token(tokenizer, domain):
    for item in rows(DATA / f"choice_{domain}.jsonl"):
        context = tokenizer(item["context"])["input_ids"]
        for choice in item["choices"]:
            apart = context + tokenizer(" " + choice)["input_ids"]
            assert tokenizer(item["context"] + " " + choice)["input_ids"] == apart


def test_arithmetic_answers_are_right():
    items = rows(DATA / "arithmetic.jsonl")
    assert len(items) >= 450
    for item in items:
        a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)=", item["question"]).groups()
        assert int(item["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_arithmetic_heldout_is_disjoint_from_training():
    train = exercises(arithmetic.documents("train", count=corpus.ARITHMETIC_DOCUMENTS["train"]))
    calibration = exercises(row["text"] for row in rows(demo.CALIBRATION["arithmetic"]))
    asked = {item["question"] + item["answer"] for item in rows(DATA / "arithmetic.jsonl")}
    heldout = asked | exercises(row["text"] for row in rows(DATA / "bpb_arithmetic.jsonl"))
    assert not train & heldout
    assert not calibration & heldout
    pairs = [set(arithmetic.pairs(split)) for split in SPLITS]
    assert sum(map(len, pairs)) == len(set().union(*pairs)) == 5050


def test_calibration_and_evaluation_texts_are_disjoint():
    calibration = set()
    for path in demo.CALIBRATION.values():
        for row in rows(path):
            calibration |= corpus.shingles(row["text"])
    for domain in CHOICE_DOMAINS:
        texts = [row["text"] for row in rows(DATA / f"bpb_{domain}.jsonl")]
        texts += [item["context"] for item in rows(DATA / f"choice_{domain}.jsonl")]
        mine = set().union(*map(corpus.shingles, texts))
        assert len(mine & calibration) < 0.1 * len(mine), domain


def test_bpb_documents_and_choice_items_are_disjoint():
    for domain in CHOICE_DOMAINS:
        documents = "\n".join(row["text"] for row in rows(DATA / f"bpb_{domain}.jsonl"))
        for item in rows(DATA / f"choice_{domain}.jsonl"):
            assert item["context"] not in documents


def test_corpus_split_is_deterministic():
    # literal values: a changed rule would move held-out text into the training text of the shipped model
    assert [split_of(f"networkx:file{i}.py") for i in range(4)] == ["train", "train", "heldout", "train"]
    assert arithmetic.documents("heldout", count=3) == arithmetic.documents("heldout", count=5)[:3]


def test_pieces_put_together_are_the_text():
    text = "short\n" + "x" * 95 + "\n\n" + "line\n" * 30
    cut = corpus.pieces(text, size=40)
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 40
