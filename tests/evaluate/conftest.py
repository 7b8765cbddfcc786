"""A tiny model, a tokenizer trained in process and a task folder; nothing comes from the network."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

TEXT = "the cat sat on a mat while rain fell over an old stone bridge near Zürich and people walked home"
WORDS = TEXT.split()

YAML = {
    "pick": """
task: pick
dataset_path: json
dataset_kwargs: {data_files: {test: sets/toy/data/pick.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 2.5}
""",
    "pick_late": """
include: pick.yaml
task: pick_late
process_docs: !function helpers.second_half
""",
    "pick_shots": """
include: pick.yaml
task: pick_shots
num_fewshot: 2
fewshot_split: test
""",
    "read": """
task: read
dataset_path: json
dataset_kwargs: {data_files: {test: [data/read.jsonl]}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
metadata: {version: 1}
""",
    "say": """
task: say
dataset_path: json
dataset_kwargs: {data_files: {test: data/say.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["!"], do_sample: false, max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
""",
    "picks": "group: picks\ntask: [pick, pick_late]\n",
    "all": "group: all\ntask: [picks, read]\n",
}
HELPERS = """
def second_half(docs):
    return docs.select(range(len(docs) // 2, len(docs)))
"""


@pytest.fixture(scope="session", autouse=True)
def _own_cache_and_one_thread(tmp_path_factory):
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


def sentence(source: random.Random, length: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(length))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    source = random.Random(0)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([sentence(source, 30) for _ in range(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")


def build(seed: int, *, vocab: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=44, moe_intermediate_size=24, num_hidden_layers=2,
        num_experts=10, num_experts_per_tok=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture(scope="session")
def build_model():
    return build


@pytest.fixture(scope="session")
def model(tokenizer) -> Qwen3MoeForCausalLM:
    return build(1, vocab=len(tokenizer))


@pytest.fixture(scope="session")
def other_model(tokenizer) -> Qwen3MoeForCausalLM:
    return build(2, vocab=len(tokenizer))


@pytest.fixture(scope="session")
def items(model, tokenizer) -> dict[str, list[dict]]:
    source = random.Random(3)
    pick = [
        {
            "question": sentence(source, source.randint(2, 9)),
            "choices": [sentence(source, source.randint(1, 4)) for _ in range(3)],
            "gold": source.randrange(3),
        }
        for _ in range(14)
    ]
    read = [{"text": sentence(source, length)} for length in (3, 11, 5, 8, 2)]
    say = [{"question": sentence(source, length)} for length in (4, 7, 2, 5)]
    for index, item in enumerate(say):
        item["answer"] = greedy_text(model, tokenizer, item["question"]) if index % 2 else "nothing of the kind"
    return {"pick": pick, "read": read, "say": say}


def greedy_text(model, tokenizer, prompt: str) -> str:
    """Three greedy tokens, up to an exclamation mark or the end, without a cache."""
    ids = tokenizer.encode(prompt)
    start = len(ids)
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split("!")[0]


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory, items) -> Path:
    """``sets/toy`` below a root; one task names its data from the root, others from the folder itself."""
    folder = tmp_path_factory.mktemp("root") / "sets" / "toy"
    (folder / "data").mkdir(parents=True)
    for name, rows in items.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for name, text in YAML.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "helpers.py").write_text(HELPERS)
    return folder
