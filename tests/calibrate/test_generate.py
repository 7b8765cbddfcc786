"""A model's own answers: the same for a seed whatever the batch, continued after a kill, read back token by token."""

import json

import pytest
import torch

from moeprune.calibrate.data import read_domain
from moeprune.calibrate.generate import _rounds, _Sampler, answers_as_data, generate_answers
from moeprune.calibrate.prompts import read_prompts
from moeprune.calibrate.ranks import Ranks
from moeprune.checkpoint.load import load_model, load_tokenizer
from moeprune.data_spec import DataSpec
from moeprune.demo import MODEL_DIR
from moeprune.errors import DataError
from tests.calibrate.test_ranks import torchrun
from tests.calibrate.tokenizer import CHAT_TEMPLATE, byte_tokenizer, ids_of

TEXTS = ["def add(a, b):", "In the beginning", "2 + 3 =", "Hello", "import"]


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL_DIR, device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL_DIR)


@pytest.fixture(scope="module")
def prompts(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return read_prompts([DataSpec(source=str(path))], tokenizer=tokenizer)


def answer(model, tokenizer, prompts, out, **options):
    options = {"max_new_tokens": 8, "temperature": 0.8, "quiet": True, "batch_size": 2} | options
    generate_answers(model, tokenizer, prompts, out=out, **options)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def answers(model, tokenizer, prompts, tmp_path_factory):
    return answer(model, tokenizer, prompts, tmp_path_factory.mktemp("answers") / "out.jsonl")


def test_an_answer_continues_its_prompt(answers, prompts, tokenizer):
    assert [row["prompt"] for row in answers] == [prompt.text for prompt in prompts]
    for row, prompt in zip(answers, prompts, strict=True):
        assert row["input_ids"][: len(prompt.ids)] == list(prompt.ids)
        assert row["answer"] == tokenizer.decode(row["input_ids"][len(prompt.ids) :])
        assert 0 < len(row["input_ids"]) - len(prompt.ids) <= 8


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_does_not_decide_an_answer(model, tokenizer, prompts, answers, tmp_path, batch_size):
    assert answer(model, tokenizer, prompts, tmp_path / "out.jsonl", batch_size=batch_size) == answers


def test_the_seed_does(model, tokenizer, prompts, answers, tmp_path):
    other = answer(model, tokenizer, prompts, tmp_path / "out.jsonl", seed=1)
    assert [row["answer"] for row in other] != [row["answer"] for row in answers]


def test_temperature_0_takes_the_likeliest_token(model, tokenizer, prompts, tmp_path):
    (row, *_) = answer(model, tokenizer, prompts[:1], tmp_path / "out.jsonl", temperature=0, max_new_tokens=4)
    ids = list(prompts[0].ids)
    for _ in range(4):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert row["input_ids"] == ids


def test_sampling_has_the_probabilities_of_the_softmax():
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampler = _Sampler(seed=0, numbers=[0], temperature=0.5)
    drawn = torch.stack([sampler(torch.empty(1, 0), scores)[0].argmax() for _ in range(20_000)])
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(share, (scores[0] / 0.5).softmax(0), rtol=0, atol=0.012)  # three standard errors


@pytest.mark.parametrize(("kept", "asked_again"), [(0, 5), (1, 5), (2, 3), (3, 3), (3.5, 3), (5, 0)])
def test_a_run_that_was_killed_is_continued_in_the_same_batches(
    model, tokenizer, prompts, answers, tmp_path, kept, asked_again
):
    out = tmp_path / "out.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in answers]
    part = lines[3][: len(lines[3]) // 2] if kept == 3.5 else ""
    out.write_text("".join(line + "\n" for line in lines[: int(kept)]) + part)
    calls = []
    generate = model.generate
    model.generate = lambda **options: calls.append(len(options["input_ids"])) or generate(**options)
    try:
        assert answer(model, tokenizer, prompts, out) == answers
    finally:
        del model.generate
    assert sum(calls) == asked_again


def test_ranks_share_the_prompts_and_write_what_one_process_does(model, tokenizer, prompts, answers, tmp_path):
    out = tmp_path / "out.jsonl"
    answer(model, tokenizer, prompts, tmp_path / "alone.jsonl")
    alone = (tmp_path / "alone.jsonl").read_bytes()
    result = torchrun("-m", "tests.calibrate.answering", out, tmp_path / "prompts.jsonl", *TEXTS)
    assert result.returncode == 0, result.stderr
    assert out.read_bytes() == alone
    # Batches of two of five prompts: rank 0 has the first and the last, rank 1 the one between.
    assert [int(out.with_suffix(f".{rank}").read_text()) for rank in (0, 1)] == [3, 2]

    out.write_bytes(b"".join(alone.splitlines(keepends=True)[:3]) + b'{"key": ')
    result = torchrun("-m", "tests.calibrate.answering", out, tmp_path / "prompts.jsonl", *TEXTS)
    assert result.returncode == 0, result.stderr
    assert out.read_bytes() == alone
    assert [int(out.with_suffix(f".{rank}").read_text()) for rank in (0, 1)] == [2, 1]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 5, 8, 13])
def test_rounds_of_all_ranks_are_the_prompts_in_order(world, count):
    ranks = [list(_rounds(range(100, 100 + count), 2, Ranks(rank, world))) for rank in range(world)]
    assert [at for batches in zip(*ranks, strict=True) for batch in batches for at in batch] == [
        *range(100, 100 + count)
    ]


def test_finished_answers_are_left_as_they_are(model, tokenizer, prompts, answers, tmp_path):
    out = tmp_path / "out.jsonl"
    answer(model, tokenizer, prompts, out)
    before = out.read_bytes()
    answer(model, tokenizer, prompts, out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"temperature": 0}, {"max_new_tokens": 9}, {"name": "another"}])
def test_answers_of_another_run_are_not_continued(model, tokenizer, prompts, answers, tmp_path, change):
    out = tmp_path / "out.jsonl"
    answer(model, tokenizer, prompts, out)
    before = out.read_bytes()
    with pytest.raises(DataError, match="line 1: the answer to another prompt, or one of another model, seed"):
        answer(model, tokenizer, prompts, out, **change)
    assert out.read_bytes() == before


def test_a_file_of_something_else_is_not_written_over(model, tokenizer, prompts, tmp_path):
    (tmp_path / "out.jsonl").write_text("my notes\n")
    with pytest.raises(DataError, match="line 1: the answer to another prompt"):
        answer(model, tokenizer, prompts, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "my notes\n"


def test_answers_are_calibration_text_token_by_token(model, tokenizer, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    rows = answer(model, tokenizer, prompts, out)
    (spec,) = answers_as_data(out)
    read = read_domain(spec, tokenizer=tokenizer, length=64, tokens=1, seed=0, vocab_size=len(tokenizer), packing="pad")
    found = [ids[mask].tolist() for ids, mask in zip(read.ids, read.mask, strict=True)]
    assert sorted(found) == sorted(row["input_ids"] for row in rows)


def test_a_prompt_that_leaves_no_room(model, tokenizer, prompts, tmp_path):
    with pytest.raises(DataError, match=r"the longest prompt has \d+ tokens; with answers of up to 1000000 that"):
        answer(model, tokenizer, prompts, tmp_path / "out.jsonl", max_new_tokens=1_000_000)
    assert not (tmp_path / "out.jsonl").exists()


TEMPLATE = CHAT_TEMPLATE + "{% if add_generation_prompt %}[assistant]{% endif %}"


def asked(tmp_path, rows: list[dict], *, template: str | None = TEMPLATE, **spec):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts([DataSpec(source=str(path), **spec)], tokenizer=byte_tokenizer(chat_template=template))


def test_a_chat_is_asked_up_to_its_last_answer(tmp_path):
    messages = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    (prompt,) = asked(tmp_path, [{"messages": messages}])
    assert prompt.text == "[user]a[assistant]b[user]c[assistant]"
    assert list(prompt.ids) == ids_of(prompt.text)


def test_a_question_is_a_chat_where_there_is_a_template_and_text_where_not(tmp_path):
    assert asked(tmp_path, [{"prompt": "why"}])[0].text == "[user]why[assistant]"
    assert asked(tmp_path, [{"prompt": "why"}], template=None)[0].text == "why"
    assert asked(tmp_path, [{"text": "why"}])[0].text == "why"


def test_prompts_have_the_domain_of_their_row_or_of_their_file(tmp_path):
    found = asked(tmp_path, [{"prompt": "a", "domain": "math"}, {"prompt": "b"}])
    assert sorted(prompt.domain for prompt in found) == ["math", "p"]


def test_prompts_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"nosuch\.jsonl: no such file\."):
        read_prompts([DataSpec(source="nosuch.jsonl")], tokenizer=byte_tokenizer())
    with pytest.raises(DataError, match=r"prompts are counted, their answers' tokens are not known\. Give documents=N"):
        asked(tmp_path, [{"prompt": "a"}], tokens=5)
    with pytest.raises(DataError, match="no prompts; every row is empty"):
        asked(tmp_path, [{"prompt": " "}, {"prompt": None}])
    with pytest.raises(DataError, match=r"no column 'promt'\. Did you mean 'prompt'\?"):
        asked(tmp_path, [{"prompt": "a"}], column="promt")
    with pytest.raises(DataError, match="column 'prompt' holds int, expected text or messages"):
        asked(tmp_path, [{"prompt": 3}])


def test_the_questions_of_a_mix_are_asked_without_their_answers(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "why", "a": "so"}\n')
    (tmp_path / "mix.yaml").write_text(
        f"domains:\n"
        f"  - {{domain: chats, source: {tmp_path}/a.jsonl, prompt: q, response: a, documents: 1}}\n"
        f"  - {{domain: texts, source: {tmp_path}/a.jsonl, text: '{{{{ q }}}}: ', documents: 1}}\n"
    )
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    prompts = read_prompts([DataSpec(source=str(tmp_path / "mix.yaml"))], tokenizer=tokenizer)
    assert [(prompt.domain, prompt.text) for prompt in prompts] == [
        ("chats", "[user]why[assistant]"),
        ("texts", "why: "),
    ]
